"""What the files of a workdir say, for launch/report.py; no jax."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch import metrics

CONFIG, GROWTH = 'config.json', 'upcycle.json'
# Names of metrics that count what went wrong.
COUNTS = r'(^|[_/])(errors|timeouts|nonfinite|refused|skipped|dropped|missing|bad)$'


@dataclasses.dataclass(frozen=True)
class Span:
  """A phase and its steps."""
  name: str
  first: int
  last: int


@dataclasses.dataclass(frozen=True)
class Run:
  """What is known of a run. values: {metric: ([n] steps, [n] values, [n] phases)}."""
  name: str
  folder: Path
  lines: list[dict[str, Any]]
  values: dict[str, tuple[np.ndarray, np.ndarray, list[str]]]
  phases: list[Span]
  samples: list[dict[str, Any]]
  warnings: list[tuple[int, str]]
  config: dict[str, Any]
  grown: int = 0                       # step at which its experts were multiplied; 0: never


def load(workdirs: Sequence[str | Path]) -> list[Run]:
  """The runs, under names that tell them apart."""
  folders = [Path(w).resolve() for w in workdirs]
  if not folders:
    raise ValueError('a report needs at least one workdir')
  if len(set(folders)) < len(folders):
    raise ValueError(f'a workdir was given twice: {[str(w) for w in workdirs]}')
  depth = 1
  while len({f.parts[-depth:] for f in folders}) < len(folders):
    depth += 1
  return [read_run(folder, '/'.join(folder.parts[-depth:])) for folder in folders]


def read_run(folder: Path, name: str) -> Run:
  """Everything a report says of one workdir."""
  if not (folder / metrics.METRICS).is_file():
    raise ValueError(f'{folder} is no workdir: it has no {metrics.METRICS}')
  lines = metrics.read_metrics(folder)
  if not lines:
    raise ValueError(f'{folder / metrics.METRICS} is empty: no step was logged yet')
  found: dict[str, tuple[list, list, list]] = {}
  spans: list[Span] = []
  for line in lines:
    step, phase = line['step'], line.get('phase', '')
    if spans and spans[-1].name == phase:
      spans[-1] = dataclasses.replace(spans[-1], last=step)
    elif phase:
      spans.append(Span(phase, spans[-1].last if spans else step, step))
    for metric, value in line.items():
      if metric not in metrics.RESERVED and isinstance(value, (int, float)):
        for column, entry in zip(found.setdefault(metric, ([], [], [])), (step, value, phase)):
          column.append(entry)
  values = {k: (np.array(s), np.array(v, np.float64), p) for k, (s, v, p) in found.items()}
  return Run(name, folder, lines, values, spans, metrics.read_lines(folder / metrics.SAMPLES),
             read_warnings(folder, values), read_config(folder), read_growth(folder))


def read_warnings(folder: Path, values: dict) -> list[tuple[int, str]]:
  """(step, text) of all that went wrong: what was said, what was counted, what was not finite."""
  found = [(line['step'], str(line.get('text', '')))
           for line in metrics.read_lines(folder / metrics.WARNINGS)]
  for name, (steps, numbers, _) in sorted(values.items()):
    if (wrong := ~np.isfinite(numbers)).any():
      found.append((int(steps[wrong][0]), f'{name} was not finite in {wrong.sum()} of {len(steps)} '
                                          'logged steps'))
    counted = np.isfinite(numbers) & (numbers > 0)
    if re.search(COUNTS, name) and counted.any():
      found.append((int(steps[counted][0]), f'{name}: {numbers[counted].sum():g}, '
                                            f'in {counted.sum()} of {len(steps)} logged steps'))
  for path in sorted(folder.glob('bad_batch_*.npz')):
    found.append((-1, f'a batch whose loss or gradient was not finite is in {path.name}'))
  return sorted(found, key=lambda entry: entry[0])


def read_growth(folder: Path) -> int:
  """The step that the file of launch/growth.py names; 0 if there is none."""
  path = folder / GROWTH
  return json.loads(path.read_text())['step'] if path.exists() else 0


def read_config(folder: Path) -> dict[str, Any]:
  """The resolved config; {} if the run did not write it."""
  path = folder / CONFIG
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
