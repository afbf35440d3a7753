"""How a run begins, is resumed, tells about itself and ends: what `launch/train.py` needs around the loop."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels import attention
from launch import checkpoint, loop, metrics
from launch import config as config_lib
from launch import mesh as mesh_lib
from launch import report as report_lib
from launch import step as step_lib
from launch.phases import Built, Run
from nn import model, param


def check_workdir(checkpoints: checkpoint.Checkpointer, config: Any, allow_change: bool) -> int | None:
  """The step to go on from, None for a new run. Refuses a workdir of another run."""
  step = checkpoints.latest()
  if step is None:
    return None
  meta = checkpoints.meta(step)
  if tuple(meta['phases']) != tuple(config.phases):
    raise ValueError(f'the workdir holds a run of phases {tuple(meta["phases"])}, this one has {tuple(config.phases)}; '
                     'take another workdir')
  if not allow_change:
    config_lib.check_resume(json.dumps(meta['config']), config)
  return step


def begin(run: Run, built: list[Built], checkpoints: checkpoint.Checkpointer, resumed: int | None,
          init: str) -> tuple[step_lib.TrainState, dict, int]:
  """(state, {phase: memory}, step) of a new run, or of the checkpoint of step `resumed`."""
  memory = {b.phase.name: b.memory for b in built}
  if resumed is None:
    first = built[0]
    if init:
      params = checkpoint.load_params(init, param.abstract(run.specs, run.shardings))
    else:
      params = jax.jit(lambda key: param.init(key, run.specs), out_shardings=run.shardings)(run.key_of('init'))
    return fresh_state(run, first, params, 0), memory, 0
  meta = checkpoints.meta(resumed)
  owner = next(b for b in built if b.phase.name == meta['phase'])
  for b in built:
    if b.phase.name in meta['contracts']:
      b.check(meta['contracts'][b.phase.name])
  state = checkpoints.restore(resumed, abstract_state(run, owner))
  return state, memory | checkpoints.memory(resumed), resumed


def fresh_state(run: Run, built: Built, params: Any, updates: Any) -> step_lib.TrainState:
  """The parameters with an optimiser that has seen nothing."""
  start = jax.jit(lambda p: built.tx.init(param.split(p, run.specs)[0]), out_shardings=built.state_shardings.opt_state)
  return step_lib.TrainState(jax.device_put(jnp.int32(updates), run.replicated), params, start(params))


def abstract_state(run: Run, built: Built) -> step_lib.TrainState:
  """Shapes, dtypes and shardings of a phase's state."""
  params = param.abstract(run.specs)
  opt_state = jax.eval_shape(built.tx.init, param.split(params, run.specs)[0])
  plain = step_lib.TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, built.state_shardings)


def enter(run: Run, built: Built, state: step_lib.TrainState, memory: dict, step: int,
          resumed: int | None) -> tuple[step_lib.TrainState, dict]:
  """Makes state and readers those of a phase that begins, or goes on in the middle."""
  phase = built.phase
  if step == resumed and step > phase.first:
    built.restore(memory[phase.name])
  elif phase.first > 0:
    wanted = jax.tree.structure(jax.eval_shape(built.tx.init, param.split(state.params, run.specs)[0]))
    if built.reset_optimizer:
      state = fresh_state(run, built, state.params, state.updates)
    elif jax.tree.structure(state.opt_state) != wanted:
      raise ValueError(f'{phase.name}: the optimiser of the phase before keeps another kind of state; set '
                       f'{phase.name}.reset_optimizer=true')
  built.enter(state.params)
  return state, memory


def write_config(run: Run, config: Any) -> None:
  """The resolved config, for people and for the report."""
  if jax.process_index() == 0:
    run.workdir.mkdir(parents=True, exist_ok=True)
    (run.workdir / 'config.json').write_text(config_lib.to_json(config) + '\n')


def open_log(run: Run, built: list[Built], resumed: int | None) -> metrics.Logger:
  """The run's log, with what the run is printed at its head."""
  c = run.config.log
  log = metrics.Logger(
      run.workdir, total_steps=built[-1].phase.last, resumed=resumed or 0, tensorboard=c.tensorboard, wandb=c.wandb,
      phase_ends={b.phase.name: b.phase.last for b in built})
  log.summary(describe(run, built, resumed))
  for b in built:
    for what, (rows, first) in b.report().items():
      log.warn(resumed or 0, f'{b.phase.name}: {what}: {rows}; first: {first}')
  return log


def describe(run: Run, built: list[Built], resumed: int | None) -> list[tuple[str, str]]:
  """The start-up summary: (name, value) lines."""
  devices = jax.devices()
  rules = dict(run.cfg.rules)
  held = param.bytes_per_device(run.specs, run.mesh, rules)
  moments = max(opt_bytes(run, b) for b in built)
  mesh = ' x '.join(f'{axis} {size}' for axis, size in run.mesh.shape.items() if size > 1) or 'one device'
  lines = [
      ('devices', f'{len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es)'), ('mesh', mesh),
      ('model', f'{param.count(run.specs):,} parameters, {len(run.cfg.layers)} layers, compute in {run.cfg.dtype}'),
      ('bytes per device', f'{held:,} parameters + {moments:,} optimiser + {held:,} gradients'),
      ('attention', run.cfg.attention if run.cfg.attention != 'auto' else
       f'auto: {attention.choose(jax.default_backend(), built[-1].length, run.cfg.head_dim)}')]
  for b in built:
    p = b.phase
    lines.append((p.name, f'steps {p.first} to {p.last}, up to {b.tokens:,} tokens a step'))
  lines.append(('workdir', f'{run.workdir}' + (f', resumed at step {resumed}' if resumed is not None else '')))
  return lines


def opt_bytes(run: Run, built: Built) -> int:
  """Bytes of optimiser state one device holds."""
  state = abstract_state(run, built).opt_state
  return sum(int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
             for x in jax.tree.leaves(state))


def make_hooks(run: Run, built: list[Built], checkpoints: checkpoint.Checkpointer, log: metrics.Logger,
               config: Any) -> Callable:
  """hooks(phase, memory of all phases) -> loop.Hooks."""
  stop = loop.StopSignal()
  every, log_every = run.config.checkpoint.every, run.config.log.every
  base = {'phases': list(config.phases), 'config': json.loads(config_lib.to_json(config)),
          'contracts': {b.phase.name: b.contract for b in built}}
  peak = metrics.peak_flops(jax.devices())

  def hooks(b: Built, memory: dict) -> loop.Hooks:
    def save(step, phase, state, now, values, wait):
      checkpoints.save(step, state, memory | {phase.name: now}, base | {'phase': phase.name}, metrics=values, wait=wait)

    def write(step, phase, values, tokens, seconds):
      if seconds:
        values = values | {'tokens_per_second': tokens / seconds, 'seconds': seconds}
        if peak:
          values |= {'mfu': tokens / seconds * phase.flops_per_token / peak}
      if not seconds or (step - phase.first) % log_every == 0 or step == phase.last:
        log.log(step, values, phase=phase.name)

    def dump(step, batch):
      return loop.dump_batch(str(run.workdir / f'bad_batch_{step}_process_{jax.process_index()}.npz'), batch)

    return loop.Hooks(
        save=save, due=lambda step: step % every == 0, log=write, warn=log.warn,
        show=lambda step, rows: log.samples(step, rows, phase=b.phase.name), dump=dump, stop=stop,
        agree=lambda flag: flag if jax.process_count() == 1 else bool(mesh_lib.sum_over_processes(np.float64(flag)) > 0))

  return hooks


def finish(run: Run) -> None:
  """Writes the report and prints the table of before and after."""
  if jax.process_index() == 0:
    path = report_lib.build([str(run.workdir)])
    print(report_lib.before_after([str(run.workdir)]))
    print(f'report: {path}')
