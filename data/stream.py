"""Stages between random access and packing: reading on from a number, by workers or not; dropping.

The place of a sub-stream is the number of elements taken from it. It means the same for any number
of workers, since elements are one to one with indices: what a row is dropped for travels with it
and is counted here, after the workers.
"""

import grain
from absl import flags

BUFFER = 32                            # elements a worker prepares ahead


class Elements(grain.IterDataset):
  """The elements of a MapDataset in order. State: {'next': index}."""

  def __init__(self, source: grain.MapDataset, workers: int):
    super().__init__()
    self._source, self._workers = source, workers

  def __iter__(self):
    return _ElementsIterator(self._source, self._workers)


class _ElementsIterator(grain.DatasetIterator):

  def __init__(self, source, workers):
    super().__init__()
    self._source, self._workers = source, workers
    self._next, self._inner = 0, None

  def __next__(self):
    if self._inner is None:
      self._inner = _iterate(self._source[self._next:], self._workers)
    element = next(self._inner)
    self._next += 1
    return element

  def get_state(self):
    return {'next': self._next}

  def set_state(self, state):
    self._stop()
    self._next = state['next']

  def close(self):
    super().close()
    self._stop()

  def _stop(self):
    if self._inner is not None:
      self._inner.close()
    self._inner = None


def _iterate(source: grain.MapDataset, workers: int) -> grain.DatasetIterator:
  elements = source.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  if workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()     # grain's workers read flags; programs need not have any
    elements = elements.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=BUFFER))
  return iter(elements)


class Kept(grain.IterDataset):
  """Elements that have tokens, as {'tokens', 'mask'}; counts faults.

  State: the parent's, and {fault: [count, message of the first]}.

  Raises (when iterated):
    ValueError: `limit` elements in a row were dropped, which is all there are.
  """

  def __init__(self, parent: grain.IterDataset, limit: int):
    super().__init__(parent)
    self._limit = limit

  def __iter__(self):
    return _KeptIterator(iter(self.parents[0]), self._limit)


class _KeptIterator(grain.DatasetIterator):

  def __init__(self, parent, limit):
    super().__init__(parent)
    self._from, self._limit, self._faults = parent, limit, {}

  def __next__(self):
    for _ in range(self._limit):
      element = next(self._from)
      if fault := element['fault']:
        count, first = self._faults.get(fault, (0, element['why']))
        self._faults[fault] = [count + 1, first]
      if len(element['tokens']):
        return {'tokens': element['tokens'], 'mask': element['mask']}
    raise ValueError(f'all of {self._limit} rows in succession were dropped; '
                     f'the last: {element["why"]}')

  def get_state(self):
    return {'parent': self._from.get_state(), 'faults': dict(self._faults)}

  def set_state(self, state):
    self._from.set_state(state['parent'])
    self._faults = dict(state['faults'])


def faults(state: dict) -> dict[str, list]:
  """{fault: [count, message of the first]} in the state of whatever stands on top of Kept."""
  while 'faults' not in state:
    state = next(state[k] for k in ('parent', 'parent_state') if k in state)
  return state['faults']
