"""Rows of a source as examples: prompt and response, conversations, or whole documents.

What the readers call examples has len(examples), examples.example(index, epoch),
examples.in_order(dropped), which gives (tokens, mask, whether they begin a text) once through, and
examples.identity() for the data contract.
"""

import collections
import dataclasses
from collections.abc import Iterator

import numpy as np

from data import fields
from data.fields import Format
from data.sources import Rows
from data.tokenizer import Tokenizer

LONG = ('error', 'truncate', 'drop', 'split')


def element(tokens=(), mask=(), fault: str = '', why: str = '') -> dict:
  """One example on its way to a batch.

  Args:
    tokens, mask: of one length; empty: dropped.
    fault: what is counted: bad, long or truncated; '' for nothing.
    why: the message that goes with it.
  """
  return {'tokens': np.asarray(tokens, np.int32), 'mask': np.asarray(mask, np.float32),
          'fault': fault, 'why': why}


class Examples:
  """One example per row."""

  def __init__(self, rows: Rows, form: Format, tokenizer: Tokenizer, *, length: int,
               long: str = 'error', skip_bad_rows: bool = False):
    """long: what becomes of more than `length` tokens: error, truncate, drop; split over rows."""
    if long not in LONG:
      raise ValueError(f'long is {long!r}, wanted one of {LONG}')
    self._rows, self._form, self._tokenizer = rows, form, tokenizer
    self._length, self._long, self._skip = length, long, skip_bad_rows

  def __len__(self):
    return len(self._rows)

  def example(self, index: int, epoch: int) -> dict:
    del epoch                          # a row is the same every time
    try:
      tokens, mask = fields.at(
          self._rows, index, lambda row: fields.example(row, self._form, self._tokenizer))
    except ValueError as e:
      if self._skip:
        return element(fault='bad', why=str(e))
      raise
    if len(tokens) <= self._length or self._long == 'split':
      return element(tokens, mask)
    why = f'{self._rows.where(index)}: {len(tokens)} tokens, rows have {self._length}'
    if self._long == 'error':
      raise ValueError(f'{why}; make rows longer, or choose truncate or drop')
    if self._long == 'truncate' and any(mask[:self._length]):
      return element(tokens[:self._length], mask[:self._length], 'truncated', why)
    return element(fault='long', why=why)

  def in_order(self, dropped: collections.Counter) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    for i in range(len(self)):
      found = self.example(i, 0)
      dropped.update([found['fault']] if found['fault'] else [])
      if len(found['tokens']):
        yield found['tokens'], found['mask'], True

  def identity(self) -> dict:
    return {'rows': len(self), 'source': self._rows.identity(),
            'tokenizer': self._tokenizer.fingerprint(), 'format': dataclasses.asdict(self._form),
            'long': self._long, 'skip_bad_rows': self._skip}
