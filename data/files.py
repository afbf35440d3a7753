"""Files as bytes at random places: globs, packed files, and where lines begin.

Nothing is read whole. What takes a pass over a file is kept in a cache folder, under a name made of
the file's path, size, time and content digest; it appears there whole or not at all, so several
processes may start at once.
"""

import contextlib
import glob
import gzip
import hashlib
import os
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zstandard

FORMAT = 1                             # of what lies in the cache folder
HELD = 1 << 12                        # entries of an index in memory while it is built
BLOCK = 1 << 20                        # bytes read at a time in a pass over a file
SLICE = 1 << 10                        # bytes of packed text unpacked at a time
SAMPLES, SAMPLE = 64, 1 << 16          # evenly spaced samples in a digest, and their bytes


def expand(patterns: str | tuple[str, ...]) -> tuple[Path, ...]:
  """The files that match, each once, in the order of their names.

  Raises:
    ValueError: a pattern without a match, or an empty file.
  """
  found = set()
  for pattern in [patterns] if isinstance(patterns, str) else patterns:
    pattern = os.path.expanduser(pattern)
    matches = [p for p in [pattern, *glob.glob(pattern, recursive=True)] if os.path.isfile(p)]
    if not matches:
      raise ValueError(f'no file matches {pattern!r}')
    found.update(matches)
  for path in found:
    if not os.path.getsize(path):
      raise ValueError(f'{path} is empty')
  return tuple(Path(p) for p in sorted(found))


def read(path: Path, start: int, stop: int) -> bytes:
  """Bytes start to stop of a file, fewer at its end.

  The file is opened anew each time: no handle to share with a copy in another process, or to run
  out of.
  """
  with open(path, 'rb') as f:
    f.seek(start)
    return f.read(max(stop - start, 0))


def digest(path: Path) -> str:
  """A digest of a file's size and content; above 4 MiB, of evenly spaced samples of the content."""
  size = os.path.getsize(path)
  result = hashlib.sha256(str(size).encode())
  step = max(SAMPLE, -(-size // SAMPLES))
  for start in range(0, size, step):
    result.update(read(path, start, start + SAMPLE))
  result.update(read(path, size - SAMPLE if size > SAMPLE else 0, size))
  return result.hexdigest()[:16]


def identity(path: Path) -> dict:
  """What the data contract says about a file; not where it lies or when it was written."""
  return {'name': path.name, 'bytes': os.path.getsize(path), 'digest': digest(path)}


def kind(path: Path) -> str:
  """The last suffix, without that of a compression: '.jsonl' of 'a.jsonl.gz'."""
  return (path.with_suffix('') if path.suffix in ('.gz', '.zst') else path).suffix


def plain(path: Path, cache: str) -> Path:
  """The file itself, or an unpacked copy of a compressed one in the cache folder."""
  if path.suffix not in ('.gz', '.zst'):
    return path
  target = _cached(path, cache, '.plain')
  if not target.exists():
    with whole(target) as out:
      try:
        for block in _unpacked(path):
          out.write(block)
      except (OSError, EOFError, zlib.error, zstandard.ZstdError) as e:
        if isinstance(e, OSError) and not isinstance(e, gzip.BadGzipFile):
          raise                        # a full disk is not the file's fault
        raise ValueError(f'{path} cannot be unpacked: {e}') from e
      if not out.tell():
        raise ValueError(f'{path} is empty')
  return target


def line_index(path: Path, cache: str) -> Path:
  """A file of int64 pairs: where each line that is not blank begins, and its number from 1.

  The last pair is the size of the file and 0. Packed files are unpacked first.

  Raises:
    ValueError: every line is blank.
  """
  target = _cached(path, cache, '.lines')
  if target.exists():
    return target
  with open(plain(path, cache), 'rb', buffering=BLOCK) as f, whole(target) as out:
    found, place = [], 0
    for number, line in enumerate(f, 1):
      if not line.isspace():
        found.append((place, number))
      place += len(line)
      if len(found) == HELD:
        out.write(np.array(found, np.int64).tobytes())
        found = []
    if not found and not out.tell():
      raise ValueError(f'{path} has no rows: every line is blank')
    out.write(np.array([*found, (place, 0)], np.int64).tobytes())
  return target


def _unpacked(path: Path) -> Iterator[bytes]:
  if path.suffix == '.gz':
    with gzip.open(path) as f:
      while block := f.read(BLOCK):
        yield block
    return
  # One object per frame: the package's stream reader takes a file that breaks off for one that
  # ends. It unpacks all it is given at once, so it is given little.
  frame = None
  with open(path, 'rb') as f:
    while block := f.read(SLICE):
      while block:
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        yield frame.decompress(block)
        block = frame.unused_data
        frame = None if frame.eof else frame
  if frame:
    raise EOFError('the last frame breaks off')


def _cached(path: Path, cache: str, suffix: str) -> Path:
  if not cache:
    raise ValueError(f'{path}: reading it needs a cache folder')
  stat = os.stat(path)
  key = f'{FORMAT}\0{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0{digest(path)}'
  return Path(cache) / (hashlib.sha256(key.encode()).hexdigest()[:24] + suffix)


@contextlib.contextmanager
def whole(target: Path):
  """A file to write that gets its name when it is complete, and vanishes if it never is."""
  target.parent.mkdir(parents=True, exist_ok=True)
  part = target.with_name(f'{target.name}.{uuid.uuid4().hex[:8]}.part')
  try:
    with open(part, 'xb') as out:
      yield out
    os.replace(part, target)
  except BaseException:
    part.unlink(missing_ok=True)
    raise


def text_digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]
