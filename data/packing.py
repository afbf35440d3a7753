"""Elements to rows of one length, and all that is taken from grain's experimental namespace.

T positions of a row. A row is {'tokens', 'segments', 'positions' [T] int32, 'mask' [T] float32}:
segments count from 1, 0 is padding; positions restart in every segment; mask is 1 where a token is
to be predicted, never at the first of a segment.
"""

import functools
from collections.abc import Iterable, Iterator

import grain
import numpy as np

PACKINGS = ('split', 'fit', 'pad')


def pack(
    elements: grain.IterDataset, kind: str, *, length: int, bins: int, seed: int
) -> grain.IterDataset:
  """{'tokens', 'mask'} of any length -> rows of `length` positions.

  Args:
    kind: split (all joined, then cut: no padding), fit (first fit: nothing is cut) or pad (one
      element per row).
    bins: fit: rows filled at a time. More: less padding, and rows come from further apart.
    seed: fit: order in which filled rows leave.
  """
  sizes = {'tokens': length, 'mask': length}
  if kind == 'split':
    rows = grain.experimental.ConcatThenSplitIterDataset(elements, length_struct=sizes)
  elif kind == 'fit':
    rows = grain.experimental.FirstFitPackIterDataset(
        elements, length_struct=sizes, num_packing_bins=bins, seed=seed % 2**32,
        meta_features=('mask',))
  elif kind == 'pad':
    return elements.map(functools.partial(_alone, length))
  else:
    raise ValueError(f'packing is {kind!r}, wanted one of {PACKINGS}')
  return rows.map(_rename)


def prefetch(rows: grain.IterDataset, size: int) -> grain.IterDataset:
  """Prepares `size` elements ahead in a thread; its state is that of what was taken out."""
  return grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=size)


def for_json(state: dict) -> dict:
  """A state of the iterator of packed rows as JSON gives it back; `from_json` undoes it."""
  return _slices(state, list)


def from_json(state: dict) -> dict:
  """ConcatThenSplit compares its slices with tuples, which JSON does not have."""
  return _slices(state, tuple)


def _slices(state, kind):
  slices = state.get('remainder_slices')
  return state | {'remainder_slices': {k: kind(v) for k, v in slices.items()}} if slices else state


def row(pieces: list[tuple[np.ndarray, np.ndarray]], length: int) -> dict[str, np.ndarray]:
  """(tokens, mask) of each segment -> a padded row."""
  tokens, segments, positions = np.zeros((3, length), np.int32)
  mask, start = np.zeros(length, np.float32), 0
  for number, (some, some_mask) in enumerate(pieces, 1):
    place = slice(start, start + len(some))
    tokens[place], mask[place], segments[place] = some, some_mask, number
    positions[place] = np.arange(len(some))
    start = place.stop
  return _finish(tokens, mask, segments, positions)


def windows(texts: Iterable[tuple[np.ndarray, np.ndarray, bool]], length: int) -> Iterator[tuple]:
  """Cuts texts into (tokens, mask) of at most `length` tokens that overlap by one.

  So every token of a text but its first is predicted once: a window's first token is not.

  Args:
    texts: (tokens, mask, whether a text begins here or goes on).
  """
  tokens, mask = np.zeros(0, np.int32), np.zeros(0, np.float32)
  for more, more_mask, begins in texts:
    if begins:
      if len(tokens) > 1:
        yield tokens, mask
      tokens, mask = more, more_mask
    else:
      tokens, mask = np.concatenate([tokens, more]), np.concatenate([mask, more_mask])
    while len(tokens) > length:
      yield tokens[:length], mask[:length]
      tokens, mask = tokens[length - 1:], mask[length - 1:]
  if len(tokens) > 1:
    yield tokens, mask


def in_order(
    pieces: Iterable[tuple[np.ndarray, np.ndarray]], length: int
) -> Iterator[dict[str, np.ndarray]]:
  """Fills rows with pieces as they come; a piece that does not fit begins the next row."""
  waiting, size = [], 0
  for piece in pieces:
    if waiting and size + len(piece[0]) > length:
      yield row(waiting, length)
      waiting, size = [], 0
    waiting.append(piece)
    size += len(piece[0])
  if waiting:
    yield row(waiting, length)


def _alone(length: int, element: dict) -> dict[str, np.ndarray]:
  return row([(element['tokens'], element['mask'])], length)


def _rename(packed: dict) -> dict[str, np.ndarray]:
  return _finish(packed['tokens'], packed['mask'], packed['tokens_segment_ids'],
                 packed['tokens_positions'])


def _finish(tokens, mask, segments, positions) -> dict[str, np.ndarray]:
  return {'tokens': tokens, 'segments': segments, 'positions': positions,
          'mask': np.where((positions > 0) & (segments > 0), mask, 0).astype(np.float32)}
