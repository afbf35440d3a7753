"""Parts of a mixture: shuffled, sharded, repeated, tokenised and mixed, all at random access."""

import dataclasses
import functools
from typing import Any

import grain

from data import shuffle as shuffling


@dataclasses.dataclass(frozen=True)
class Part:
  """Examples (see data/sft.py) and how often they come up."""
  name: str
  examples: Any
  weight: float = 1.0


def elements(
    parts: tuple[Part, ...], *, seed: int, stream: int, streams: int, shuffle: bool = True
) -> grain.MapDataset:
  """The endless sequence of elements of one of the sub-streams of a run.

  In every epoch of a part each of its examples is in exactly one sub-stream. Parts are interleaved
  exactly: with weights 3 and 1, three of every four elements are of the first.

  Args:
    shuffle: in another order in every epoch; otherwise as they stand in the source.

  Raises:
    ValueError: no parts, two of one name, a weight that is not positive, or a part with fewer rows
      than streams.
  """
  if len({p.name for p in parts}) < len(parts) or not parts:
    raise ValueError(f'wanted parts of different names, got {[p.name for p in parts]}')
  for p in parts:
    if p.weight <= 0:
      raise ValueError(f'{p.name}: weight {p.weight}, wanted a positive one')
    if len(p.examples) < streams:
      raise ValueError(f'{p.name}: {len(p.examples)} rows cannot feed {streams} streams')
  sharded = [_part(p, f'{seed} {i}' if shuffle else '', stream, streams)
             for i, p in enumerate(parts)]
  if len(parts) == 1:
    return sharded[0]
  return grain.MapDataset.mix(sharded, [p.weight for p in parts])


def _part(part: Part, key: str, stream: int, streams: int) -> grain.MapDataset:
  size = len(part.examples)
  # Not grain's shuffle: it takes milliseconds per row of a source of few rows.
  rows = grain.MapDataset.range(size).map_with_index(functools.partial(_place, size, key))
  return rows[stream::streams].repeat().map(functools.partial(_example, part.examples))


def _place(size: int, key: str, index: int, row: int) -> tuple[int, int]:
  """(row, epoch) of an index, which counts on beyond the first epoch; key '': as rows stand."""
  epoch = index // size
  return shuffling.permuted(row, size, f'{key} {epoch}') if key else row, epoch


def _example(examples, where: tuple[int, int]) -> dict:
  return examples.example(*where)
