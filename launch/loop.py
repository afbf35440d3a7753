"""One loop for text, pairs and rollouts: collect what needs today's weights, update, remember, log.

A step is a turn of this loop; `step` counts the turns that are done. The metrics of a step are
fetched while the next one runs, so the device never waits for the host.
"""

import dataclasses
import functools
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Feed(NamedTuple):
  """Where batches come from: text and SFT rows, or rollouts."""
  collect: Callable    # (params, memory, step) -> work: all that needs the weights as they are now
  batches: Callable    # work -> iterator of Batch; each is one optimiser step
  finish: Callable     # work -> memory: nested dicts of arrays, numbers and strings, to be kept
  describe: Callable   # work -> Told


class Told(NamedTuple):
  """What a step has to say before its metrics are there."""
  notes: dict          # {metric: number}
  tokens: int          # of this step
  samples: tuple = ()  # rows to show
  warning: str = ''


@dataclasses.dataclass(frozen=True)
class Phase:
  """A part of a run with data, terms and schedule of its own: steps first <= step < last."""
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
  reached: Callable = lambda metrics: False      # {metric: number} -> bool: is that good enough
  refused: Callable = lambda opt_state: False


class NonFinite(RuntimeError):
  """A loss, gradient or parameter was not finite; no checkpoint holds it."""


class Stopped(Exception):
  """Asked to stop (SIGTERM, SIGINT); everything is saved."""


class StopSignal:
  """Turns SIGTERM and SIGINT into a question the loop asks between steps, until it is closed.

  A second signal kills as usual.
  """

  def __init__(self):
    self.name = ''
    self._before = {}

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._remember)
    return self

  def __exit__(self, *exception):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _remember(self, number, frame):
    del frame
    self.name = signal.Signals(number).name
    signal.signal(number, signal.SIG_DFL)


class Hooks(NamedTuple):
  """What the loop may do to the outside world."""
  save: Callable       # (step, phase, state, memory, metrics, wait) -> None
  finite: Callable     # state -> bool: may it be saved
  due: Callable        # (step, metrics of an evaluation) -> bool: is a checkpoint due
  log: Callable        # (step, phase, {metric: number}, tokens, seconds) -> None
  show: Callable       # (step, phase, sample rows) -> None
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


def settle(
    pending: Pending, fetched: list[dict], phase: Phase, hooks: Hooks, seconds: float) -> None:
  """Logs the metrics of a step, and refuses to go on if they are not finite."""
  values = {}
  for name in fetched[0] if fetched else ():
    series = [float(m[name]) for m in fetched]
    # Later updates of a step train with other weights than those that sampled; the last one says
    # why the reuse ended.
    first, last = name.startswith(('parity', 'routes')), name.startswith('gate/')
    values[name] = series[0] if first else series[-1] if last else float(np.mean(series))
  if 'gate/refused' in values:
    values['gate/updates'] = len(fetched) - values['gate/refused']
  # Notes win: a term may be called like one of them ('entropy').
  hooks.log(pending.step, phase, values | pending.notes, pending.tokens, seconds)
  for batch, metrics in zip(pending.batches, fetched):
    if metrics['nonfinite']:
      refuse(pending.step, batch, hooks, f'loss {float(metrics["loss"])} or gradient norm '
             f'{float(metrics["grad_norm"])} is not finite, the update was refused')


def refuse(step: int, batch: Any, hooks: Hooks, why: str) -> None:
  """Dumps the batch, says why the run cannot go on, and stops it."""
  hooks.warn(step, f'{why}; its batch is in {hooks.dump(step, batch)}')
  raise NonFinite(why)


def train(phase: Phase, state: Any, memory: Any, start: int, hooks: Hooks, fresh: bool) -> Any:
  """Runs a phase from step `start` to its end.

  Args:
    state: launch.step.TrainState; donated to the train step.
    memory: what the feed and the methods remember.
    fresh: False if a checkpoint of this step of this phase was restored, whose evaluation and
      saving are done.

  Returns:
    state after step phase.last - 1, or after the evaluation with which the phase reached its aim.

  Raises:
    NonFinite, Stopped: see there.
  """
  pending, used = None, []

  def settled(until=None):
    nonlocal pending
    if pending is not None:
      ready = jax.device_get(pending.metrics)
      settle(pending, ready, phase, hooks, (until or time.perf_counter()) - pending.began)
    pending = None

  for step in range(start, phase.last + 1):
    metrics, over = {}, step == phase.last
    if fresh or step > start:
      if phase.evaluate and is_evaluated(phase, step):
        settled()
        metrics = phase.evaluate(state.params, step)
        hooks.log(step, phase, metrics, 0, 0.0)
        over = over or phase.reached(metrics)
      stopping = hooks.agree(bool(hooks.stop.name))
      if over or step > start and (stopping or hooks.due(step, metrics)):
        settled()
        if not hooks.finite(state):
          refuse(step, used[-1], hooks, 'parameters or moments are not finite after the update')
        # A phase that ends early leaves its other steps out: the next one begins where it would.
        hooks.save(phase.last if over else step, phase, state, memory, metrics, stopping)
      if stopping:
        raise Stopped(hooks.stop.name or 'a signal to another process')
    if over:
      break
    began = time.perf_counter()
    work = phase.feed.collect(state.params, memory, step)
    used, results = [], []
    rate = phase.rate(step - phase.first)
    for batch in phase.feed.batches(work):
      state, result = phase.train_step(state, batch, np.float32(rate))
      used.append(batch)
      results.append(result)
      if phase.refused(state.opt_state):
        break
    memory = phase.feed.finish(work)
    settled(began)
    told = phase.feed.describe(work)
    notes = told.notes | {'learning_rate': rate}
    pending = Pending(step + 1, used, results, notes, told.tokens, began)
    if told.samples:
      hooks.show(step + 1, phase, told.samples)
    if told.warning:
      hooks.warn(step + 1, told.warning)
  settled()
  return state


def is_evaluated(phase: Phase, step: int) -> bool:
  """At both ends of the phase, and evaluate_every steps apart."""
  return step in (phase.first, phase.last) or (step - phase.first) % phase.evaluate_every == 0


def dump_batch(path: str, batch: Any) -> str:
  """Writes a batch of numpy arrays as .npz, for a post-mortem; returns the path."""
  name = functools.partial(jax.tree_util.keystr, simple=True, separator='/')
  np.savez(path, **{name(place): x for place, x in jax.tree.leaves_with_path(batch)})
  return path
