"""Multi-query associative recall (arXiv:2312.04927).

Pairs of a key and a value, then every key again, to be answered.

A row of n pairs is `k1 v1 k2 v2 .. kn vn  q1 a1 q2 a2 .. qn an`: 4 n tokens, keys and values all
different within their kind, queries in another order. Only the answers are trained on. It is what a
linear-attention state is short of: with more pairs than key channels, old ones have to be
overwritten or written over one another.
"""

import collections
import random
from collections.abc import Iterator

import numpy as np

from data.sft import element


class Recall:
  """Examples, see data/sft.py, made up when they are asked for.

  A function of seed, side, pairs, index and epoch.
  """

  def __init__(
      self, pairs: int, *, symbols: int, first_id: int, rows: int, seed: int, side: str,
      length: int,
  ):
    """symbols: keys to draw from, and as many values; their ids are counted from first_id."""
    if not 1 <= pairs <= symbols:
      raise ValueError(f'recall.pairs has {pairs}, wanted 1 to recall.symbols {symbols}')
    if 4 * pairs > length:
      raise ValueError(
          f'recall.pairs has {pairs}, which makes {4 * pairs} tokens; rows have {length}')
    self._pairs, self._symbols, self._first = pairs, symbols, first_id
    self._rows, self._seed, self._side = rows, seed, side

  def __len__(self):
    return self._rows

  def example(self, index: int, epoch: int) -> dict:
    rng = random.Random(f'{self._seed} {self._side} {self._pairs} {index} {epoch}')
    keys = rng.sample(range(self._symbols), self._pairs)
    values = rng.sample(range(self._symbols), self._pairs)
    order = rng.sample(range(self._pairs), self._pairs)
    shown = list(zip(keys, values))
    asked = [shown[i] for i in order]
    tokens = np.array(shown + asked) + (self._first, self._first + self._symbols)
    mask = np.zeros((2 * self._pairs, 2), np.float32)
    mask[self._pairs:, 1] = 1
    return element(tokens.reshape(-1), mask.reshape(-1))

  def in_order(self, dropped: collections.Counter) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    del dropped
    for i in range(len(self)):
      found = self.example(i, 0)
      yield found['tokens'], found['mask'], True

  def identity(self) -> dict:
    return {'pairs': self._pairs, 'symbols': self._symbols, 'first_id': self._first,
            'rows': self._rows, 'seed': self._seed, 'side': self._side}
