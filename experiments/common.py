"""Comparisons: arms x seeds of launch/train.py, resumable; the tables and plots of docs/results.md.

An arm is a config and what it overrides. Every pair of arm and seed has a workdir; one that is done
is not run again, one that was interrupted goes on.
"""

import argparse
import bisect
import concurrent.futures
import dataclasses
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Arm:
  name: str
  config: str                          # as configs/mqar.py
  overrides: tuple[str, ...] = ()      # as model.gdn.variant=kda
  flags: tuple[str, ...] = ()          # as --allow_config_change
  start: Callable | None = None        # (folder, seed) -> Python's arguments to begin the workdir


def parser(description: str, workdir: str) -> argparse.ArgumentParser:
  p = argparse.ArgumentParser(
      description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--workdir', type=Path, default=Path(workdir),
                 help='folder of the runs; started again, it goes on')
  p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  p.add_argument('--arms', nargs='+', help='only these')
  p.add_argument('--jobs', type=int, default=2, help='runs side by side, each on a core of its own')
  p.add_argument('--only_table', action='store_true', help='of what is there')
  return p


def chosen(arms: dict[Any, Arm], options: Any) -> dict[Any, Arm]:
  """Those that --arms names; all of them without it."""
  return {key: arm for key, arm in arms.items() if not options.arms or arm.name in options.arms}


def run_all(arms: Sequence[Arm], options: Any) -> None:
  """Runs every arm with every seed, seeds first, so that early results cover all arms.

  Raises:
    RuntimeError: a run failed; its log is named.
  """
  cores = queue.SimpleQueue()
  for core in sorted(os.sched_getaffinity(0))[:options.jobs]:
    cores.put(core)
  wanted = chosen(dict(enumerate(arms)), options).values()
  todo = [(arm, seed) for seed in options.seeds for arm in wanted]
  with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
    for done in [pool.submit(run, arm, seed, options.workdir, cores) for arm, seed in todo]:
      done.result()


def count(config: str, overrides: Sequence[str]) -> int:
  """Parameters of the model that a run with these overrides has."""
  from launch import config as config_lib
  from nn import model, param
  loaded = config_lib.load(ROOT / config, [tuple(x.split('=', 1)) for x in overrides])
  return param.count(model.specs(config_lib.model_config(loaded.model, 259)))


def equal(config: str, kinds: dict[str, tuple[str, ...]], widths: Sequence[int]) -> list[Arm]:
  """An arm for each kind of model {name: overrides}, with about equally many parameters.

  As many as the largest has at widths[0].

  Args:
    widths: of the FFN, to choose from, ascending; every step adds parameters.
  """
  most = max(count(config, changes) for changes in kinds.values())
  out = []
  for name, changes in kinds.items():
    size = lambda f: count(config, (*changes, f'model.ffw_dim={f}'))
    at = bisect.bisect_left(widths, most, key=size)
    best = min(widths[max(at - 1, 0):at + 1], key=lambda f: abs(size(f) - most))
    out.append(Arm(name, config, (*changes, f'model.ffw_dim={best}')))
  return out


def folder(workdir: Path, arm: Arm, seed: int) -> Path:
  return workdir / f'{arm.name}-{seed}'.replace(', ', '_').replace(' ', '_')


def copy_of(workdir: Path, source: Arm) -> Callable:
  """Begins a run where another arm's run of the same seed ended; for `Arm.start`."""
  def command(where, seed):
    return ['-c', 'import shutil, sys; shutil.copytree(*sys.argv[1:])',
            folder(workdir, source, seed).resolve() / 'checkpoints', where / 'checkpoints']
  return command


def run(arm: Arm, seed: int, workdir: Path, cores: queue.SimpleQueue) -> None:
  """One run, in a process of its own on a core of its own."""
  where = folder(workdir, arm, seed)
  mark = where / 'done.json'
  if mark.exists():
    return
  where.mkdir(parents=True, exist_ok=True)
  core, start = cores.get(), time.time()
  options = ['seed=' + str(seed), 'report=False', *arm.overrides]
  commands = [['launch/train.py', '--config', arm.config, '--workdir', str(where.resolve()),
               *arm.flags, *(f'--config.{x}' for x in options)]]
  if arm.start and not (where / 'checkpoints').exists():
    commands.insert(0, [str(x) for x in arm.start(where.resolve(), seed)])
  try:
    for command in commands:
      with open(where / 'log.txt', 'a') as log:
        code = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, [core])).returncode
      if code:
        raise RuntimeError(
            f'{arm.name} with seed {seed} ended with {code}; see {where / "log.txt"}')
  finally:
    cores.put(core)
  mark.write_text(json.dumps({'seconds': time.time() - start}))
  print(f'{arm.name} seed {seed}: {time.time() - start:.0f} s', flush=True)


def lines(workdir: Path, arm: Arm, seed: int) -> list[dict]:
  """The lines of a run's metrics.jsonl; none if it has not begun."""
  path = folder(workdir, arm, seed) / 'metrics.jsonl'
  return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def last(workdir: Path, arm: Arm, seed: int, name: str) -> float:
  """The last value of a metric; NaN if there is none."""
  found = [x[name] for x in lines(workdir, arm, seed) if name in x]
  return found[-1] if found else float('nan')


def of_phase(workdir: Path, arm: Arm, seed: int, phase: str) -> list[dict]:
  """The lines of a phase; their steps are counted from its begin."""
  found = [x for x in lines(workdir, arm, seed) if x.get('phase') == phase]
  begin = min((x['step'] for x in found), default=0)
  return [x | {'step': x['step'] - begin} for x in found]


def first(found: Sequence[dict], name: str, least: float) -> int | None:
  """The step at which a metric first is at least that; None: never."""
  return next((x['step'] for x in found if x.get(name, -np.inf) >= least), None)


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
  """As '0.912 ± 0.004': mean and sample standard deviation over seeds."""
  values = np.asarray(values, float)
  spread = f' ± {values.std(ddof=1):.{digits}f}' if len(values) > 1 else ''
  return f'{values.mean():.{digits}f}{spread}'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table in Markdown."""
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (header, ['---'] * len(header), *rows))


def figure(path: Path, draw, width: float = 6.0, height: float = 3.6,
           panels: tuple[int, int] = (1, 1)) -> None:
  """Saves what draw(axes) draws as an SVG.

  Args:
    width, height: inches.
    panels: rows and columns of axes; draw gets an array [rows, columns] of them, if not one.
  """
  import matplotlib
  matplotlib.use('svg')
  matplotlib.rcParams['svg.hashsalt'] = 'nacre'          # the same plot is the same file
  from matplotlib import pyplot
  drawn, grid = pyplot.subplots(
      *panels, figsize=(width, height), layout='constrained', squeeze=False)
  draw(grid if grid.size > 1 else grid[0, 0])
  for axes in grid.flat:
    axes.grid(alpha=0.3)
  path.parent.mkdir(parents=True, exist_ok=True)
  drawn.savefig(path, metadata={'Date': None})
  pyplot.close(drawn)
  path.write_text('\n'.join(x.rstrip() for x in path.read_text().splitlines()) + '\n')
