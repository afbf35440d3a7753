"""Builds the phases of a run from its config: data, terms, optimiser, train step, evaluation."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from data import prompts as prompts_lib
from data import reader as reader_lib
from launch import config as config_lib
from launch import engine as engine_lib
from launch import mesh as mesh_lib
from launch import optimizer, rl_phase, rollout, text_phase
from launch import step as step_lib
from launch.loop import Phase
from nn import model, param
from nn.config import ModelConfig
from rl import compose, methods, sample
from rl.envs import arithmetic
from rl.rewards import pool
from rl.types import Source


@dataclasses.dataclass
class Run:
  """What all phases of a run share."""
  config: Any                      # launch.config.Tracked
  cfg: ModelConfig
  specs: Any
  mesh: jax.sharding.Mesh
  tokenizer: Any
  workdir: Path
  key: jax.Array                   # of the run
  closing: list                    # readers and worker pools, to be closed at the end
  weights: dict                    # {source name: parameters}, beside the policy's

  def key_of(self, name: str) -> jax.Array:
    """The key of one stream of noise."""
    return jax.random.fold_in(self.key, zlib.crc32(name.encode()))

  @functools.cached_property
  def shardings(self) -> Any:
    return param.shardings(self.specs, self.mesh, dict(self.cfg.rules))

  @functools.cached_property
  def replicated(self) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

  @functools.cached_property
  def task(self) -> dict[str, list[dict]]:
    """The generated arithmetic problems: {'train', 'demos', 'heldout'}."""
    c = self.config.arithmetic
    kind = arithmetic.Arithmetic(digits=c.digits, operands=c.operands, ops=c.ops, worked=c.worked)
    train, demos, heldout = arithmetic.split(kind, self.config.seed, c.train, c.demos, c.heldout)
    return {'train': train, 'demos': demos, 'heldout': heldout}


@dataclasses.dataclass(frozen=True)
class Built:
  """A phase, and what its state and memory are made of."""
  phase: Phase
  tx: optax.GradientTransformationExtraArgs
  reset_optimizer: bool
  state_shardings: step_lib.TrainState
  memory: dict                     # what a fresh phase remembers
  contract: dict                   # of its data; compared on resume
  restore: Callable                # memory -> None: puts readers back to their place
  enter: Callable                  # params -> None: called when the phase begins or is resumed
  tokens: int                      # of a step, at most
  choices: dict                    # {what: implementation}, for the start-up summary


def plan(config: Any) -> list[tuple[str, int, int]]:
  """(phase, first step, last step) in the order of the run; the steps of all phases are one count."""
  if not config.phases:
    raise ValueError('phases is empty; name at least one of pretrain, sft, rl')
  if twice := sorted({p for p in config.phases if config.phases.count(p) > 1}):
    raise ValueError(f'phases {config.phases} names {twice} twice')
  out, first = [], 0
  for name in config.phases:
    if name not in config_lib.PHASES:
      raise ValueError(f'there is no phase {name!r}' + config_lib.hint(name, config_lib.PHASES))
    out.append((name, first, first + config[name].steps))
    first += config[name].steps
  return out


def build(run: Run, name: str, first: int, last: int) -> Built:
  """One phase, ready to run; opens its data, compiles nothing."""
  return (build_rl if name == 'rl' else build_text)(run, name, first, last)


def build_optimizer(run: Run, c: Any, steps: int) -> tuple[Any, Callable, step_lib.TrainState]:
  """Optimiser, rate (step of the phase -> learning rate), and the shardings of the train state."""
  o = c.optimizer
  options = {k: o[k] for k in ('name', 'weight_decay', 'clip', 'b1', 'b2', 'eps')}
  if o.name == 'muon':
    options |= {k: o[k] for k in ('muon_beta', 'muon_steps', 'muon_rms', 'adam_rate')}
  tx = optimizer.make(run.specs, **options)
  shape = {'peak': o.learning_rate, 'steps': steps, 'warmup': o.warmup}
  if o.schedule != 'constant':
    shape['floor'] = o.floor
  if o.schedule == 'wsd':
    shape['decay'] = o.decay
  rate = optimizer.schedule(o.schedule, **shape)
  opt_state = optimizer.state_shardings(tx, run.specs, run.shardings, run.mesh)
  return tx, rate, step_lib.TrainState(run.replicated, run.shardings, opt_state)


def build_step(run: Run, terms: tuple, tx: Any, shardings: Any, rows: int, microbatches: int, where: str) -> Callable:
  """The jitted train step; refuses batches that mesh and microbatches do not divide."""
  ways = mesh_lib.batch_ways(run.mesh)
  if rows % (ways * microbatches):
    raise ValueError(f'{where}: {rows} rows of an optimiser step cannot be divided into {microbatches} microbatches '
                     f'on {ways} devices; take a multiple of {ways * microbatches}')
  loss = step_lib.make_loss(engine_lib.make_forward(run.cfg), terms)
  train_step = step_lib.make_train_step(loss, tx, run.specs, microbatches)
  return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, run.replicated))


def rows_of(run: Run, c: Any, split: str) -> Any:
  """What a phase's data is: generated rows, or None where files are read."""
  return run.task[split] if c.data.format == 'arithmetic' else None
