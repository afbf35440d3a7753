"""One loop for text, pairs and rollouts: collect what needs today's weights, update, remember, log.

A step is a turn of this loop; `step` counts the turns that are done. The metrics of a step are fetched while the next one
runs, so the device never waits for the host.
"""

import dataclasses
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from nn import param


class Feed(NamedTuple):
  """Where batches come from: text and SFT rows, or rollouts."""
  collect: Callable    # (params, memory, step) -> work: all that needs the weights as they are now
  batches: Callable    # work -> iterator of Batch; each is one optimiser step
  finish: Callable     # work -> memory: nested dicts of arrays, numbers and strings, all that must be remembered
  describe: Callable   # work -> Told


class Told(NamedTuple):
  """What a step has to say before its metrics are there."""
  notes: dict          # {metric: number}
  tokens: int          # of this step
  samples: tuple = ()  # rows to show
  warning: str = ''


@dataclasses.dataclass(frozen=True)
class Phase:
  """A part of a run with its own data, terms and optimiser schedule: steps first <= step < last."""
  name: str
  kind: str            # pretrain, sft, rl
  first: int
  last: int
  feed: Feed
  train_step: Callable             # (state, batch, learning rate) -> (state, metrics)
  rate: Callable                   # step since first -> learning rate
  evaluate: Callable | None        # (params, step) -> {metric: number}; changes nothing
  evaluate_every: int
  flops_per_token: float
  refused: Callable = lambda opt_state: False


class NonFinite(RuntimeError):
  """A loss or gradient was not finite; the step was refused and its batch dumped."""


class Stopped(Exception):
  """Asked to stop (SIGTERM, SIGINT); everything is saved."""


class StopSignal:
  """Turns SIGTERM and SIGINT into a question the loop asks between steps. A second signal kills as usual."""

  def __init__(self):
    self.name = ''
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._remember)

  def _remember(self, number, frame):
    del frame
    self.name = signal.Signals(number).name
    signal.signal(number, signal.SIG_DFL)


class Hooks(NamedTuple):
  """What the loop may do to the outside world."""
  save: Callable       # (step, phase, state, memory, metrics, wait) -> None
  due: Callable        # step -> bool: is a checkpoint due
  log: Callable        # (step, phase, {metric: number}, tokens, seconds) -> None
  show: Callable       # (step, sample rows) -> None
  warn: Callable       # (step, text) -> None
  dump: Callable       # (step, batch) -> where it was written
  stop: StopSignal
  agree: Callable      # bool -> bool: true on all processes if it is on any


class Pending(NamedTuple):
  """A step whose metrics may still be on the devices."""
  step: int
  batches: list
  metrics: list
  notes: dict
  tokens: int
  began: float         # of the step, on time.perf_counter's clock


def settle(pending: Pending, fetched: list[dict], phase: Phase, hooks: Hooks, seconds: float) -> None:
  """Logs the metrics of a step, and refuses to go on if they are not finite."""
  values = dict(pending.notes)
  for name in fetched[0] if fetched else ():
    series = [float(m[name]) for m in fetched]
    values[name] = series[0] if name.startswith('parity') else float(np.mean(series))
  hooks.log(pending.step, phase, values, pending.tokens, seconds)
  for batch, metrics in zip(pending.batches, fetched):
    if metrics['nonfinite']:
      where = hooks.dump(pending.step, batch)
      raise NonFinite(
          f'step {pending.step}: loss {float(metrics["loss"])} or gradient norm {float(metrics["grad_norm"])} is not '
          f'finite. The step was refused; no checkpoint holds it. Its batch is in {where}')


def train(phase: Phase, state: Any, memory: Any, start: int, hooks: Hooks, fresh: bool) -> tuple[Any, Any]:
  """Runs a phase from step `start` to its end.

  Args:
    state: launch.step.TrainState; donated to the train step.
    memory: what the feed and the methods remember.
    fresh: False if a checkpoint of exactly this step was restored, whose evaluation and saving are done.

  Returns:
    state, memory after step phase.last - 1.

  Raises:
    NonFinite, Stopped: see there.
  """
  pending = None

  def settled(until=None):
    nonlocal pending
    if pending is not None:
      ready = jax.device_get(pending.metrics)
      settle(pending, ready, phase, hooks, (until or time.perf_counter()) - pending.began)
    pending = None

  for step in range(start, phase.last + 1):
    metrics = {}
    if fresh or step > start:
      if phase.evaluate and (step in (phase.first, phase.last) or (step - phase.first) % phase.evaluate_every == 0):
        settled()
        metrics = phase.evaluate(state.params, step)
        hooks.log(step, phase, metrics, 0, 0.0)
      stopping = hooks.agree(bool(hooks.stop.name))
      if step > start and (stopping or hooks.due(step) or step == phase.last):
        settled()
        hooks.save(step, phase, state, memory, metrics, stopping)
      if stopping:
        raise Stopped(hooks.stop.name)
    if step == phase.last:
      break
    began = time.perf_counter()
    work = phase.feed.collect(state.params, memory, step)
    used, results = [], []
    for batch in phase.feed.batches(work):
      state, result = phase.train_step(state, batch, np.float32(phase.rate(step - phase.first)))
      used.append(batch)
      results.append(result)
      if phase.refused(state.opt_state):
        break
    memory = phase.feed.finish(work)
    settled(began)
    told = phase.feed.describe(work)
    notes = told.notes | {'learning_rate': phase.rate(step - phase.first)}
    pending = Pending(step + 1, used, results, notes, told.tokens, began)
    if told.samples:
      hooks.show(step + 1, told.samples)
    if told.warning:
      hooks.warn(step + 1, told.warning)
  settled()
  return state, memory


def dump_batch(path: str, batch: Any) -> str:
  """Writes a batch as .npz, for a post-mortem; returns the path."""
  leaves = param.flat({f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)
                       if getattr(batch, f.name) is not None})
  np.savez(path, **{k: np.asarray(x) for k, x in leaves.items() if x is not None})
  return path
