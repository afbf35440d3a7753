"""Batches: endless for training, to be stopped and gone on with anywhere; once for evaluation.

A run has S sub-streams, independent sequences of rows; each gives its share of every batch. Process
p of n reads sub-streams p S/n to (p + 1) S/n, so what is read depends on the seed and on S, not on
the processes or the workers.
"""

import collections
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from data import mixture, packing, stream
from data.mixture import Part

FORMAT = 1                             # of states and contracts
AHEAD = 2                              # batches prepared while the device works
BINS = 32                              # rows filled at a time by first-fit packing


class Reader:
  """An endless sequence of batches."""

  def __init__(self, parts: tuple[Part, ...], *, length: int, rows: int, seed: int,
               packing_kind: str, streams: int = 1, process: int = 0, processes: int = 1,
               workers: int = 0, shuffle: bool = True):
    """Reads one row of each part, so that a wrong field name is an error here.

    Args:
      length: T, positions of a row.
      rows: of a batch, over all processes.
      packing_kind: split, fit or pad, see data/packing.py.
      workers: processes that tokenise, for each sub-stream; 0: a thread of this one does.
      shuffle: anew in every epoch.
    """
    if rows % streams or streams % processes:
      raise ValueError(f'{rows} rows, {streams} streams, {processes} processes: each must divide '
                       'the one before')
    self._parts, self._seed, self._workers, self._shuffle = tuple(parts), seed, workers, shuffle
    self._length, self._rows, self._kind, self._streams = length, rows, packing_kind, streams
    self._mine = range(process * streams // processes, (process + 1) * streams // processes)
    for p in parts:
      p.examples.example(0, 0)
    self._contract = None
    self._iterators = {s: self._stream(s) for s in self._mine}
    # At exit, too: grain's own clean-up comes when its modules are gone, and fails aloud.
    self._end = weakref.finalize(self, _close, self._iterators)

  def _stream(self, s: int) -> grain.DatasetIterator:
    source = mixture.elements(
        self._parts, seed=self._seed, stream=s, streams=self._streams, shuffle=self._shuffle)
    every = sum(len(p.examples) for p in self._parts)
    kept = stream.Kept(stream.Elements(source, self._workers), every)
    packed = packing.pack(kept, self._kind, length=self._length, bins=BINS, seed=self._seed + s)
    batched = packed.batch(self._rows // self._streams, drop_remainder=True)
    return iter(packing.prefetch(batched, AHEAD))

  def next(self) -> dict[str, np.ndarray]:
    """{'tokens', 'segments', 'positions' int32, 'mask' float32}, [rows of this process, T]."""
    shares = [next(self._iterators[s]) for s in self._mine]
    return {k: np.concatenate([share[k] for share in shares]) for k in shares[0]}

  def state(self) -> dict[str, Any]:
    """Where the sub-streams of this process are, for JSON; what is prepared ahead is not read."""
    return {str(s): packing.for_json(self._iterators[s].get_state()) for s in self._mine}

  def restore(self, state: dict[str, Any]):
    """Goes on where the reader with that state was.

    Args:
      state: of all processes, see merge. Sub-streams of other processes are passed over.

    Raises:
      ValueError: a sub-stream of this process is missing.
    """
    if missing := [s for s in self._mine if str(s) not in state]:
      raise ValueError(f'the saved place of the data has streams {sorted(state, key=int)}, '
                       f'not {missing}')
    for s in self._mine:
      self._iterators[s].close()
      self._iterators[s] = self._stream(s)
      self._iterators[s].set_state(packing.from_json(state[str(s)]))

  def dropped(self) -> dict[str, list]:
    """{fault: [count, message of the first]} of this process's rows that were dropped or cut."""
    total = {}
    for state in self.state().values():
      for fault, (count, first) in stream.faults(state).items():
        before, first = total.get(fault, (0, first))
        total[fault] = [before + count, first]
    return total

  def contract(self) -> dict[str, Any]:
    """What the batches depend on, for JSON: stored with a state, checked before it is restored."""
    if self._contract is None:
      self._contract = {
          'format': FORMAT, 'seed': self._seed, 'shuffle': self._shuffle, 'streams': self._streams,
          'rows': self._rows, 'length': self._length,
          'packing': [self._kind, BINS if self._kind == 'fit' else 0],
          'parts': {p.name: {'weight': p.weight} | p.examples.identity() for p in self._parts}}
    return self._contract

  def check(self, saved: dict[str, Any]):
    """Compares a stored contract with this reader's.

    Raises:
      ValueError: names the first field that differs, and both values.
    """
    check(saved, self.contract())

  def close(self):
    """Ends threads and worker processes."""
    self._end()


def _close(iterators: dict):
  while iterators:
    iterators.popitem()[1].close()


def merge(states: list[dict[str, Any]]) -> dict[str, Any]:
  """The states of all processes as one, which any number of processes can restore."""
  return {s: place for state in states for s, place in state.items()}


def check(saved: Any, current: Any, field: str = ''):
  """Compares two contracts, nested dicts and lists; see Reader.check."""
  if isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
    keys = range(len(saved))
  elif isinstance(saved, dict) and isinstance(current, dict) and saved.keys() == current.keys():
    keys = saved
  elif saved != current:
    raise ValueError(f'the data are not those of the saved run: {field or "contract"} '
                     f'was {saved!r}, is {current!r}')
  else:
    return
  for key in keys:
    check(saved[key], current[key], f'{field}.{key}' if field else str(key))


def once(examples: Any, *, length: int, rows: int, process: int = 0, processes: int = 1,
         dropped: collections.Counter | None = None) -> Iterator[dict[str, np.ndarray]]:
  """Batches of everything, in order, as Reader.next gives them; the last ends with empty rows.

  Texts longer than a row are cut into rows that overlap by one token, so that every token of a text
  but its first is predicted once. Every process reads all and takes its rows.

  Args:
    rows: of a batch, over all processes.
    dropped: counts the rows that were dropped or cut, by fault.
  """
  if rows % processes:
    raise ValueError(f'{rows} rows of a batch cannot be divided among {processes} processes')
  texts = examples.in_order(collections.Counter() if dropped is None else dropped)
  filled = packing.in_order(packing.windows(texts, length), length)
  mine = slice(process * rows // processes, (process + 1) * rows // processes)
  while batch := [r for _, r in zip(range(rows), filled)]:
    batch += [packing.row([], length)] * (rows - len(batch))
    yield {k: np.stack([r[k] for r in batch[mine]]) for k in batch[0]}
