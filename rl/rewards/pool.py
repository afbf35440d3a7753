"""Grades responses: every row within a deadline, whatever its verifier does.

Workers are fresh Python processes: not forks, which would copy JAX's threads and locks, and not
those of multiprocessing, which would run the launch script again in each, JAX and all.
"""

import collections
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from rl import rewards as known
from rl.rewards import worker

ROOT = str(Path(__file__).resolve().parents[2])
COMMAND = ('import sys; sys.path.insert(0, sys.argv[1]); '
           'from rl.rewards import worker; worker.main(int(sys.argv[2]))')
START_SECONDS = 120.0       # for a worker to import what a user's reward imports
MAX_FAILED_STARTS = 5       # in one batch; then it goes on without the rewards that need workers


@dataclasses.dataclass
class Worker:
  """A process that has loaded its rewards (ready) or not yet, and what it is grading."""
  process: subprocess.Popen
  connection: Connection
  deadline: float                          # on time.monotonic's clock, for loading or for the task
  ready: bool = False
  task: tuple[str, int] | None = None      # component, index of the item


@dataclasses.dataclass
class Results:
  """What is known about N items so far."""
  items: Sequence[tuple[str, str, dict[str, Any]]]
  scores: dict[str, np.ndarray]            # {component: [N] float64}
  late: set[tuple[str, int]] = dataclasses.field(default_factory=set)
  failed: dict[tuple[str, int], str] = dataclasses.field(default_factory=dict)

  def put(self, task: tuple[str, int], score: float, error: str | None) -> None:
    name, i = task
    self.scores[name][i] = score
    if error:
      self.failed[task] = error

  def report(self) -> dict[str, Any]:
    """Counts, and the error of the first row that has one: not of the first worker to meet one."""
    first = ''
    if self.failed:
      name, i = task = min(self.failed, key=lambda task: task[::-1])
      first = f'reward {name!r}, row {self.items[i][2].get("row_id", i)}: {self.failed[task]}'
    late = len(self.late)
    return {'errors': len(self.failed) - late, 'timeouts': late, 'first_error': first}


class Grader:
  """Grades with named rewards. Holds the worker processes, if any reward needs them."""

  def __init__(self, rewards: Mapping[str, str], workers: int = 2, deadline_seconds: float = 5.0):
    """Starts the workers and waits until they have loaded.

    Args:
      rewards: {component: spec}, see `rl.rewards.check`.
      workers: processes.
      deadline_seconds: for one component of one row.

    Raises:
      ValueError: a spec that names nothing, or a file that cannot be loaded.
    """
    if not rewards:
      raise ValueError('no reward is named')
    if workers < 1 or deadline_seconds <= 0:
      raise ValueError(f'wanted at least 1 worker and a deadline above 0 seconds, '
                       f'got {workers} and {deadline_seconds}')
    self.specs = {name: known.check(spec) for name, spec in rewards.items()}
    self.outside = {n: s for n, s in self.specs.items() if s not in known.IN_PROCESS}
    self.deadline_seconds = deadline_seconds
    self.failed_starts = 0
    self.workers = [self._start() for _ in range(workers)] if self.outside else []
    try:
      for w in self.workers:
        if not w.connection.poll(max(w.deadline - time.monotonic(), 0)):
          raise ValueError(f'no answer within {START_SECONDS:g} seconds')
        if error := w.connection.recv():
          raise ValueError(error)
        w.ready = True
    except (ValueError, EOFError, OSError) as e:
      self.close()
      reason = str(e) or 'the process ended'
      raise ValueError(f'rewards {self.outside} cannot be loaded: {reason}') from e

  def grade(self, items: Sequence[tuple[str, str, dict[str, Any]]]
            ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Scores every item. What throws, hangs, dies or returns no finite number scores 0.

    Args:
      items: N of (prompt, response, row).

    Returns:
      {component: [N] float64}, and {'errors': n, 'timeouts': n, 'first_error': str or ''}.
    """
    if self.outside and not self.workers:
      raise ValueError('the grader is closed')
    results = Results(items, {name: np.zeros(len(items)) for name in self.specs})
    for name in self.specs.keys() - self.outside.keys():
      for i, item in enumerate(items):
        results.put((name, i), *worker.score(known.REWARDS[self.specs[name]], item))
    try:
      self._work(results)
    except BaseException:
      self.close()                         # answers to this batch must not reach the next one
      raise
    return results.scores, results.report()

  def close(self) -> None:
    """Ends the workers."""
    for w in self.workers:
      end(w)
    self.workers = []

  def _start(self) -> Worker:
    ours, theirs = Pipe()
    # JAX_PLATFORMS: a reward that imports jax must not take the trainer's accelerator.
    # -P: the current folder is no place to find modules in. stdin: see worker.leave_with_parent.
    process = subprocess.Popen(
        [sys.executable, '-P', '-c', COMMAND, ROOT, str(theirs.fileno())],
        stdin=subprocess.PIPE, pass_fds=(theirs.fileno(),), start_new_session=True,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'})
    theirs.close()
    ours.send(self.outside)
    return Worker(process, ours, time.monotonic() + START_SECONDS)

  def _replace(self, w: Worker) -> None:
    end(w)
    self.failed_starts += not w.ready
    self.workers[self.workers.index(w)] = self._start()

  def _work(self, results: Results) -> None:
    """Grades with the workers until nothing is left to do."""
    todo = collections.deque((name, i) for i in range(len(results.items)) for name in self.outside)
    self.failed_starts = 0
    while todo or any(w.task for w in self.workers):
      if self.failed_starts > MAX_FAILED_STARTS:
        while todo:
          results.put(todo.popleft(), 0.0, 'workers do not start any more')
      for w in list(self.workers):
        if todo and w.ready and not w.task:
          self._assign(w, todo, results)
      waiting = {w.connection: w for w in self.workers if w.task or not w.ready}
      soonest = min((w.deadline for w in waiting.values()), default=0.0)
      heard = wait(waiting, max(soonest - time.monotonic(), 0.0))
      for connection, w in waiting.items():
        if connection in heard:
          self._hear(w, results)
        elif time.monotonic() > w.deadline:
          if w.task:
            results.late.add(w.task)
            results.put(w.task, 0.0, f'no answer within {self.deadline_seconds:g} seconds')
          self._replace(w)

  def _assign(self, w: Worker, todo: collections.deque, results: Results) -> None:
    """Hands the next task to an idle worker, or replaces it if it has died meanwhile."""
    name, i = task = todo.popleft()
    try:
      w.connection.send((name, results.items[i]))
    except OSError:
      todo.appendleft(task)
      self._replace(w)
    except Exception as e:                 # pickle raises whatever the row's fields raise
      results.put(task, 0.0, worker.describe(e))
    else:
      w.task, w.deadline = task, time.monotonic() + self.deadline_seconds

  def _hear(self, w: Worker, results: Results) -> None:
    try:
      answer = w.connection.recv()
    except (EOFError, OSError, pickle.UnpicklingError):
      if w.task:
        results.put(w.task, 0.0, f'its process ended with exit code {exit_code(w.process)}')
      self._replace(w)
      return
    if w.ready:
      results.put(w.task, *answer)
      w.task = None
    w.ready = True


def exit_code(process: subprocess.Popen) -> int | None:
  try:
    return process.wait(timeout=1)
  except subprocess.TimeoutExpired:
    return None


def end(w: Worker) -> None:
  """Kills a worker and what it has started."""
  try:
    os.killpg(w.process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass
  w.process.wait()
  w.process.stdin.close()
  w.connection.close()


def weigh(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> dict[str, np.ndarray]:
  """{component: weight * score}; a component without a weight counts once.

  Raises:
    ValueError: a weight of a component that there is not.
  """
  if strange := sorted(set(weights) - set(scores)):
    raise ValueError(f'weights for rewards {strange}, which are not among {sorted(scores)}')
  return {name: weights.get(name, 1.0) * score for name, score in scores.items()}
