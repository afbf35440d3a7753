"""Rows: dicts at random places of JSON-lines and ArrayRecord files, or of a list.

len(rows), rows[i]; rows.where(i) names a row for people, by file and line; rows.identity() is what
the data contract says about them.
"""

import bisect
import json
from pathlib import Path
from typing import Protocol

import grain
import numpy as np

from data import files

LINES, RECORDS = ('.jsonl', '.ndjson'), ('.arrayrecord', '.array_record')


class Rows(Protocol):
  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict: ...

  def where(self, index: int) -> str: ...

  def identity(self) -> list: ...


class Lines:
  """A file with one JSON object per line; blank lines do not count."""

  def __init__(self, path: Path, cache: str):
    self._path, self._plain = path, files.plain(path, cache)
    self._index = files.line_index(path, cache)
    self._size = self._index.stat().st_size // 16 - 1

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    start, _, stop = self._entry(index)
    return _parse(files.read(self._plain, start, stop))

  def where(self, index):
    return f'{self._path}:{self._entry(index)[1]}'

  def identity(self):
    return [files.identity(self._path)]

  def _entry(self, index) -> list[int]:
    """Where the row begins, its line, and where the next begins."""
    if not 0 <= index < self._size:
      raise IndexError(f'row {index} of {self._size}')
    return np.frombuffer(files.read(self._index, 16 * index, 16 * index + 24), np.int64).tolist()


class Records:
  """An ArrayRecord file of JSON objects.

  The format's own index is in memory, some 30 bytes a row; left on disk it is 25 times slower.
  """

  def __init__(self, path: Path):
    self._path = path
    try:
      self._source = grain.sources.ArrayRecordDataSource(str(path))
    except RuntimeError as e:
      raise ValueError(f'{path} is not an ArrayRecord file: {e}') from e
    if not len(self._source):
      raise ValueError(f'{path} has no rows')

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    return _parse(self._source[index])

  def where(self, index):
    return f'{self._path}, record {index}'

  def identity(self):
    return [files.identity(self._path)]


class Listed:
  """Rows in memory: generated tasks."""

  def __init__(self, rows: list[dict], name: str):
    if not rows:
      raise ValueError(f'{name} has no rows')
    self._rows, self._name = rows, name

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    return self._rows[index]

  def where(self, index):
    return f'{self._name}, row {index}'

  def identity(self):
    text = json.dumps(self._rows, sort_keys=True)
    return [{'name': self._name, 'rows': len(self._rows), 'digest': files.text_digest(text)}]


class Joined:
  """Several sources, one after the other."""

  def __init__(self, parts: list[Rows]):
    self._parts = parts
    self._ends = np.cumsum([len(p) for p in parts]).tolist()

  def __len__(self):
    return self._ends[-1]

  def _find(self, index):
    part = bisect.bisect_right(self._ends, index)
    return self._parts[part], index - (self._ends[part - 1] if part else 0)

  def __getitem__(self, index):
    part, index = self._find(index)
    return part[index]

  def where(self, index):
    part, index = self._find(index)
    return part.where(index)

  def identity(self):
    return [x for p in self._parts for x in p.identity()]


class Section:
  """The rows from start to stop of a source."""

  def __init__(self, rows: Rows, start: int, stop: int):
    self._rows, self._start, self._size = rows, start, stop - start

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    if not 0 <= index < self._size:
      raise IndexError(f'row {index} of {self._size}')
    return self._rows[self._start + index]

  def where(self, index):
    return self._rows.where(self._start + index)

  def identity(self):
    return [*self._rows.identity(), {'from': self._start, 'rows': self._size}]


def load(patterns: str | tuple[str, ...], cache: str) -> Rows:
  """Rows of all files that match, in the order of their names.

  Args:
    patterns: globs of .jsonl, .ndjson (plain, .gz or .zst) and .arrayrecord files.
    cache: a folder for unpacked copies and line indexes.

  Raises:
    ValueError: nothing matches, a file is empty or of another kind.
  """
  parts = []
  for path in files.expand(patterns):
    if files.kind(path) in LINES:
      parts.append(Lines(path, cache))
    elif path.suffix in RECORDS:
      parts.append(Records(path))
    else:
      raise ValueError(f'{path}: rows are read from {LINES} (also .gz, .zst) and {RECORDS} files')
  return parts[0] if len(parts) == 1 else Joined(parts)


def split(size: int, fraction: float, side: str) -> tuple[int, int]:
  """The part [start, stop) of `size` rows or bytes that is trained on, or held out at the end.

  Args:
    fraction: share that is held out.
    side: train or heldout.

  Raises:
    ValueError: the part is empty.
  """
  if not 0 <= fraction < 1:
    raise ValueError(f'heldout is {fraction}, wanted a fraction below 1')
  if side not in ('train', 'heldout'):
    raise ValueError(f'side is {side!r}, wanted train or heldout')
  cut = int(size * (1 - fraction))
  start, stop = (0, cut) if side == 'train' else (cut, size)
  if start == stop:
    raise ValueError(f'holding out {fraction} of {size} rows or bytes leaves nothing for {side!r}')
  return start, stop


def _parse(line: bytes) -> dict:
  try:
    row = json.loads(line)
  except ValueError as e:
    raise ValueError(f'not JSON: {e}') from e
  if not isinstance(row, dict):
    raise ValueError(f'a JSON {type(row).__name__}, wanted an object')
  return row
