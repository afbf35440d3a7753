"""Prompts for reinforcement learning, at random access: a number says how far a run has read."""

import dataclasses

import numpy as np

from data import fields, shuffle
from data.fields import Format
from data.tokenizer import Tokenizer

LONG = ('error', 'drop')


class Prompts:
  """The prompts of a source's rows, in an order drawn anew in every epoch."""

  def __init__(self, rows, tokenizer: Tokenizer, *, form: Format, max_prompt: int, seed: int,
               shuffle: bool = True, long: str = 'error', skip_bad_rows: bool = False):
    """Reads the first row, so that a wrong field name is an error here; all rows if some
    may be dropped.

    Args:
      rows: see data/sources.py.
      max_prompt: in tokens.
      long: what to do with longer prompts: error (when met) or drop.

    Raises:
      ValueError: a row is malformed or too long and may not be dropped, or none is left.
    """
    if long not in LONG:
      raise ValueError(f'long is {long!r}, wanted one of {LONG}')
    self._rows, self._tokenizer, self._form, self._seed = rows, tokenizer, form, seed
    self._max, self._shuffle = max_prompt, shuffle
    self._options = {'long': long, 'skip_bad_rows': skip_bad_rows}
    self.dropped = {}                  # {fault: [count, message of the first]}
    self._kept = self._survey(long, skip_bad_rows) if long == 'drop' or skip_bad_rows else None
    if not len(self):
      raise ValueError(f'no prompt is left: {self.dropped}')
    self.row(0)

  def __len__(self):
    return len(self._rows) if self._kept is None else len(self._kept)

  def take(self, cursor: int, n: int) -> tuple[dict, ...]:
    """The n prompts from place `cursor` of the endless sequence on; the next cursor is cursor + n.

    Returns:
      The row's fields, with 'tokens' (ids, a tuple), 'prompt' (text) and 'row_id' (its number in
      the source).
    """
    return tuple(self.row(self._index(i)) for i in range(cursor, cursor + n))

  def row(self, index: int) -> dict:
    """One prompt by its place in the source, of those that were kept."""
    index = index if self._kept is None else int(self._kept[index])
    return fields.at(self._rows, index, lambda row: self._prompt(row, index))

  def identity(self) -> dict:
    """For the data contract: what the sequence depends on."""
    return {'seed': self._seed, 'shuffle': self._shuffle, 'rows': len(self),
            'source': self._rows.identity(), 'tokenizer': self._tokenizer.fingerprint(),
            'format': dataclasses.asdict(self._form), 'max_prompt': self._max, **self._options}

  def _prompt(self, row: dict, index: int) -> dict:
    text, ids = fields.prompt(row, self._form, self._tokenizer)
    if not ids:
      raise ValueError('the prompt is empty')
    if len(ids) > self._max:
      raise TooLong(f'a prompt of {len(ids)} tokens, max_prompt is {self._max}; raise it, or '
                    'choose to drop')
    return {**row, 'tokens': tuple(ids), 'prompt': text, 'row_id': index}

  def _index(self, place: int) -> int:
    epoch, i = divmod(place, len(self))
    return shuffle.permuted(i, len(self), f'{self._seed} {epoch}') if self._shuffle else i

  def _survey(self, long: str, skip_bad_rows: bool) -> np.ndarray:
    """Numbers of the rows that make a prompt: 8 bytes of memory each."""
    kept = np.zeros(len(self._rows), np.int64)
    count = 0
    for i in range(len(self._rows)):
      try:
        fields.at(self._rows, i, lambda row, i=i: self._prompt(row, i))
      except ValueError as e:
        fault = 'long' if isinstance(e.__cause__, TooLong) else 'bad'
        if not (long == 'drop' if fault == 'long' else skip_bad_rows):
          raise
        before, first = self.dropped.get(fault, (0, str(e)))
        self.dropped[fault] = [before + 1, first]
        continue
      kept[count] = i
      count += 1
    return kept[:count]


class TooLong(ValueError):
  """A prompt is longer than allowed."""
