"""Plain text and token files for pre-training: windows of a file, or chunks for a tokenizer.

Where one byte or stored number is one token, an epoch is a tiling of the files by windows, from an
offset drawn anew in every epoch. Other tokenizers read chunks that begin and end at line ends;
packing joins and cuts what they give. L tokens of a window.
"""

import bisect
import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import fields, files, sft, sources
from data.tokenizer import Tokenizer

STORED = ('.npy', '.bin')


@dataclasses.dataclass(frozen=True)
class File:
  """A file in which every item of `dtype` after `header` bytes is a token, or text in bytes."""
  path: Path                           # as the user names it
  plain: Path                          # unpacked
  dtype: str = 'uint8'
  header: int = 0
  shift: int = 0                       # id of item 0
  vocab_size: int = 0                  # 0: not checked

  @functools.cached_property
  def size(self) -> int:
    return (self.plain.stat().st_size - self.header) // np.dtype(self.dtype).itemsize

  def read(self, start: int, stop: int) -> np.ndarray:
    """Ids of the items from start to stop, [stop - start] int32."""
    begin, width = self.header, np.dtype(self.dtype).itemsize
    found = files.read(self.plain, begin + width * start, begin + width * stop)
    items = np.frombuffer(found, self.dtype)
    if self.vocab_size and (items.min() < 0 or items.max() >= self.vocab_size):
      at = int(np.argmax((items < 0) | (items >= self.vocab_size)))
      raise ValueError(f'{self.path}: token {start + at} is {items[at]}, '
                       f'the vocabulary has {self.vocab_size}')
    return items.astype(np.int32) + self.shift


@dataclasses.dataclass(frozen=True)
class Section:
  """The items from start to stop of a file."""
  file: File
  start: int
  stop: int

  def identity(self) -> dict:
    place = {'dtype': self.file.dtype, 'from': self.start, 'to': self.stop}
    return files.identity(self.file.path) | place


def text_files(patterns: str | tuple[str, ...], tokenizer: Tokenizer, cache: str) -> list[File]:
  """Plain text files, also .gz and .zst."""
  return [File(p, files.plain(p, cache), shift=tokenizer.byte_shift or 0)
          for p in files.expand(patterns)]


def token_files(
    patterns: str | tuple[str, ...], tokenizer: Tokenizer, dtype: str = ''
) -> list[File]:
  """.npy files of one dimension, and .bin files of bare numbers.

  Args:
    dtype: of .bin files; '' where each has a '<name>.json' beside it that says {"dtype": "uint16"}.

  Raises:
    ValueError: another kind of file, no dtype, or an array that is not a row of integers.
  """
  return [_token_file(p, dtype, tokenizer.vocab_size) for p in files.expand(patterns)]


def _token_file(path: Path, dtype: str, vocab_size: int) -> File:
  if path.suffix == '.npy':
    with open(path, 'rb') as f:
      try:
        old = np.lib.format.read_magic(f) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, _, stored = read(f)
      except ValueError as e:
        raise ValueError(f'{path}: {e}') from e
      if len(shape) != 1:
        raise ValueError(f'{path}: an array of shape {shape}, wanted one dimension')
      found = File(path, path, stored.str, f.tell(), vocab_size=vocab_size)
  elif path.suffix == '.bin':
    beside = path.with_name(path.name + '.json')
    if not dtype and not beside.is_file():
      raise ValueError(f'{path}: of what dtype? Give the option dtype, or write {beside.name} '
                       'with {"dtype": "uint16"} or the like')
    dtype = dtype or json.loads(beside.read_text())['dtype']
    found = File(path, path, dtype, vocab_size=vocab_size)
  else:
    raise ValueError(f'{path}: token files are {STORED}, or .jsonl files with a field of ids')
  if not _is_integer(found.dtype):
    raise ValueError(f'{path}: tokens of type {found.dtype}, wanted integers, as uint16')
  return found


def _is_integer(dtype: str) -> bool:
  try:
    return np.dtype(dtype).kind in 'iu'
  except TypeError:                    # no dtype at all
    return False


def sections(found: list[File], fraction: float, side: str) -> list[Section]:
  """What is trained on, or held out at the end, of the files as one sequence; see sources.split."""
  start, stop = sources.split(sum(f.size for f in found), fraction, side)
  result, place = [], 0
  for f in found:
    a, b = max(start - place, 0), min(stop - place, f.size)
    if a < b:
      result.append(Section(f, a, b))
    place += f.size
  return result


class Windows:
  """Windows of L tokens; none crosses from one file to the next."""

  def __init__(self, parts: list[Section], tokenizer: Tokenizer, *, length: int, seed: int):
    if length < 2 or all(p.stop - p.start < 2 for p in parts):
      names = [str(p.file.path) for p in parts]
      raise ValueError(f'{names}: rows of {length} tokens, nothing to predict')
    self._parts, self._length, self._seed = parts, length, seed
    self._fingerprint = tokenizer.fingerprint()
    counts = []
    for p in parts:
      size = p.stop - p.start
      counts.append(max(1, (size - self._slack(p)) // length))
    self._ends = np.cumsum(counts).tolist()

  def _slack(self, part: Section) -> int:
    """The largest offset of the first window."""
    return max(0, min(self._length - 1, part.stop - part.start - self._length))

  def __len__(self):
    return self._ends[-1]

  def example(self, index: int, epoch: int) -> dict:
    which = bisect.bisect_right(self._ends, index)
    part, i = self._parts[which], index - (self._ends[which - 1] if which else 0)
    drawn = hashlib.sha256(f'{self._seed} {epoch} {which}'.encode()).digest()
    offset = int.from_bytes(drawn[:8], 'little') % (self._slack(part) + 1)
    start = part.start + offset + i * self._length
    tokens = part.file.read(start, min(start + self._length, part.stop))
    return sft.element(tokens, np.ones(len(tokens)))

  def in_order(self, dropped: collections.Counter) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    del dropped                        # nothing to drop
    for p in self._parts:
      for start in range(p.start, p.stop, self._length):
        tokens = p.file.read(start, min(start + self._length, p.stop))
        yield tokens, np.ones(len(tokens), np.float32), start == p.start

  def identity(self) -> dict:
    return {'rows': len(self), 'source': [p.identity() for p in self._parts],
            'tokenizer': self._fingerprint, 'window': self._length, 'seed': self._seed}


class Chunks:
  """Text by about `chunk` bytes, tokenised when asked for. A file begins and ends as a document."""

  def __init__(self, parts: list[Section], tokenizer: Tokenizer, *, chunk: int = 1 << 14):
    self._parts, self._tokenizer, self._chunk = parts, tokenizer, chunk
    self._ends = np.cumsum([-(-(p.stop - p.start) // chunk) for p in parts]).tolist()

  def __len__(self):
    return self._ends[-1]

  def example(self, index: int, epoch: int) -> dict:
    del epoch                          # the same chunks every time, in another order
    which = bisect.bisect_right(self._ends, index)
    part, i = self._parts[which], index - (self._ends[which - 1] if which else 0)
    start = part.start + i * self._chunk
    tokens = self._read(part.file, self._line(part.file, start),
                        self._line(part.file, min(start + self._chunk, part.stop)))
    return sft.element(tokens, np.ones(len(tokens)))

  def in_order(self, dropped: collections.Counter) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    del dropped                        # nothing to drop
    starts = {0, *self._ends}
    begins = False
    for index in range(len(self)):
      begins |= index in starts
      found = self.example(index, 0)
      if len(found['tokens']):
        yield found['tokens'], found['mask'], begins
        begins = False

  def identity(self) -> dict:
    return {'rows': len(self), 'source': [p.identity() for p in self._parts], 'chunk': self._chunk,
            'tokenizer': self._tokenizer.fingerprint()}

  def _read(self, file: File, start: int, stop: int) -> list[int]:
    if start >= stop:
      return []
    try:
      text = files.read(file.plain, start, stop).decode()
    except UnicodeDecodeError as e:
      raise ValueError(f'{file.path}: byte {start + e.start} is not UTF-8; only the tokenizer '
                       'bytes reads everything') from e
    if start:
      found = self._tokenizer.encode_after(text)
    else:
      found = [*fields.begin(self._tokenizer), *self._tokenizer.encode(text)]
    return [*found, self._tokenizer.eos_id] if stop == file.size else found

  def _line(self, file: File, place: int) -> int:
    """Where a line begins, at or after a byte; a character, if no line does for a whole chunk."""
    if place in (0, file.size):
      return place
    found = files.read(file.plain, place - 1, place - 1 + self._chunk)
    end = found.find(b'\n')
    if end >= 0:
      return place + end
    inside = next((i for i, b in enumerate(found[1:]) if b & 0xC0 != 0x80), len(found) - 1)
    return place + inside
