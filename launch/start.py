"""How a run begins, is resumed, tells about itself and ends: what launch/train.py needs around the
loop.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels import attention, fg2_gdn
from launch import checkpoint, growth, hf_files, loop, metrics, models, phases
from launch import config as config_lib
from launch import mesh as mesh_lib
from launch import report as report_lib
from launch import step as step_lib
from launch.phases import Built, Run
from nn import lora, param
from nn.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the config says of the run as a whole; read before the first file is written."""
  init: str                # checkpoint whose parameters the run begins with; '': none
  origin: hf_files.Origin | None       # the public folder that these came from
  export: str              # folder that the model is written to at the end, for others; '': none
  report: bool
  save_every: int
  keep: int
  best_metric: str
  best_mode: str
  log_every: int
  tensorboard: bool
  wandb: str


def read_settings(config: Any, saved: dict | None) -> Settings:
  """The settings, checked. saved: find_saved's."""
  config_lib.at_least(1, config, 'checkpoint.every', 'checkpoint.keep', 'log.every')
  c, log = config.checkpoint, config.log
  return Settings(
      init=config.init, origin=models.origin_of(config.init, saved), export=config.export,
      report=config.report, save_every=c.every, keep=c.keep,
      best_metric=c.best_metric, best_mode=c.best_mode, log_every=log.every,
      tensorboard=log.tensorboard, wandb=log.wandb)


def find_saved(workdir: Path, config: Any, plan: list[tuple[str, int, int]],
               allow_change: bool) -> dict | None:
  """The meta data of the checkpoint to go on from, None for a new run; writes nothing.

  Args:
    plan: launch.phases.plan's.
    allow_change: go on although the config has changed.

  Raises:
    ValueError: the workdir holds a run that this one is not.
  """
  folder = workdir / checkpoint.FOLDER
  if not (steps := checkpoint.whole_steps(folder)):
    return None
  saved = checkpoint.read_meta(folder / str(steps[-1]))
  if tuple(saved['phases']) != tuple(config.phases):
    raise ValueError(f'{workdir} holds a run of phases {tuple(saved["phases"])}, this one has '
                     f'{tuple(config.phases)}; take another workdir')
  if not allow_change:
    config_lib.check_resume(json.dumps(saved['config']), config)
  name, step = saved['phase'], saved['step']
  parts = [(first, last) for n, first, last in plan if n == name]
  first, last = next((part for part in parts if part[0] == saved['first']), parts[0])
  if first != saved['first']:
    raise ValueError(f'{workdir} is in phase {name}, which began at step {saved["first"]} and with '
                     f'this config would begin at {first}; phases that are done keep their steps')
  if step > last:
    raise ValueError(f'{workdir} has done {step - first} steps of phase {name}, more than '
                     f'{name}.steps {last - first}'
                     + (', up to upcycle.at_step' if parts[1:] else ''))
  return saved


def check(run: Run, built: list[Built], settings: Settings, saved: dict | None,
          allow_change: bool) -> dict[str, str]:
  """Refuses phases that do not fit each other, the settings or the checkpoint.

  Returns:
    {phase: how its data differ from those of the saved run}, where that is allowed.
  """
  if settings.best_mode not in ('max', 'min'):
    raise ValueError(f'checkpoint.best_mode is {settings.best_mode!r}, wanted max or min')
  measured = sorted({name for b in built for name in b.measures})
  if settings.best_metric and settings.best_metric not in measured:
    raise ValueError(f'checkpoint.best_metric is {settings.best_metric!r}; the evaluations of this '
                     f'run measure {measured}')
  if settings.init:
    wanted = checkpoint.as_saved(settings.init, param.abstract(run.specs))
    checkpoint.check_params(settings.init, wanted, run.cfg)
  if settings.export:
    if Path(settings.export).exists():
      raise ValueError(f'export: {settings.export} exists and is never written over')
    hf_files.describe(built[-1].run.cfg, settings.origin)
  kind = lambda b: jax.tree.structure(phases.abstract_state(b).opt_state)
  for before, b in zip(built, built[1:]):
    if not b.reset_optimizer and kind(before) != kind(b):
      raise ValueError(
          f'{b.phase.name}: the optimiser of the phase before keeps another kind of state; set '
          f'{b.phase.name}.reset_optimizer=true')
  changes = {}
  if saved:
    folder = run.workdir / checkpoint.FOLDER / str(saved['step'])
    checkpoint.check_state(folder, phases.abstract_state(owner_of(built, saved)))
  for b in built if saved else ():
    try:
      b.check(saved['contracts'][b.phase.name])
    except ValueError as error:
      if not allow_change:
        raise
      changes[b.phase.name] = str(error)
  return changes


def owner_of(built: list[Built], saved: dict) -> Built:
  """The phase that a checkpoint was saved in."""
  return next(b for b in built
              if (b.phase.name, b.phase.first) == (saved['phase'], saved['first']))


def begin(run: Run, built: list[Built], checkpoints: checkpoint.Checkpointer, init: str,
          saved: dict | None) -> tuple[step_lib.TrainState, int]:
  """(state, step) of a new run, still without an optimiser, or of the checkpoint."""
  if saved:
    wanted = phases.abstract_state(owner_of(built, saved))
    return checkpoints.restore(saved['step'], wanted), saved['step']
  params = {}
  if init:
    whole = param.abstract(run.specs, run.shardings)
    params = checkpoint.load_params(init, checkpoint.as_saved(init, whole), run.cfg)
  if missing := run.specs.keys() - params.keys():
    pick = lambda tree: {name: tree[name] for name in missing}
    make = jax.jit(lambda key: pick(param.init(key, run.specs)), out_shardings=pick(run.shardings))
    params |= make(run.key_of('init'))
  return step_lib.TrainState(0, params, None), 0


def fresh_state(built: Built, params: Any, updates: Any) -> step_lib.TrainState:
  """The parameters with an optimiser that has seen nothing."""
  make = jax.jit(lambda p: built.tx.init(param.split(p, built.run.specs)[0]),
                 out_shardings=built.state_shardings.opt_state)
  count = jax.device_put(np.int32(updates), built.run.replicated)
  return step_lib.TrainState(count, params, make(params))


def grow(built: Built, state: step_lib.TrainState, memory: dict, log: metrics.Logger,
         ) -> step_lib.TrainState:
  """The state with which a growing phase's second part begins; says in the workdir what it did.

  Args:
    state, memory: at the end of the first part. The checkpoint of this step holds them, so that a
      run that goes on from it grows in the same way.
  """
  (o, before), run, step = built.growth, built.run, built.phase.first
  choice = growth.choose(o, before.run.cfg, before.run.specs, state,
                         gradients(before, memory, state.params, o.score_batches))
  growth.write(run.workdir, growth.document(
      step=step, origin=str(run.workdir), how=dataclasses.asdict(o), cfg=run.cfg, choice=choice))
  log.say(f'step {step}: each layer grows from {before.run.cfg.moe.experts} to '
          f'{run.cfg.moe.experts} experts, chosen by {o.selection}')
  return growth.make_grow(o, built.tx, before.run.specs, run.specs, built.state_shardings,
                          choice.index)(state)


def gradients(built: Built, memory: dict, params: Any, num: int) -> Iterator[Any]:
  """The gradients of the next optimiser steps, none of which is taken."""
  memory = built.memory | memory
  if num:
    built.restore(memory)
  for _ in range(num):
    work = built.phase.feed.collect(params, memory, built.phase.last)
    for batch in built.phase.feed.batches(work):
      yield built.gradient(params, batch)
    memory = built.phase.feed.finish(work)


def enter(built: Built, state: step_lib.TrainState, memory: dict | None,
          changed: bool) -> tuple[step_lib.TrainState, dict]:
  """State and memory of a phase that begins (memory None), or goes on where the memory was made.

  Args:
    changed: the data are not those the memory is about: it is given up.
  """
  begins = memory is None
  if begins and (built.reset_optimizer or state.opt_state is None):
    state = fresh_state(built, state.params, state.updates)
  if begins or changed:
    memory = built.memory
  else:
    memory = built.memory | memory
    built.restore(memory)
  if not finite(state):
    raise ValueError(f'{built.phase.name}: the parameters to begin with are not finite')
  built.enter(state.params, begins)
  return state, memory


@jax.jit
def finite(state: step_lib.TrainState) -> jax.Array:
  """Whether parameters and moments are all finite: [] bool."""
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(state)]))


def write_config(run: Run, config: Any) -> None:
  """The resolved config, for people and for the report."""
  if jax.process_index() == 0:
    run.workdir.mkdir(parents=True, exist_ok=True)
    (run.workdir / 'config.json').write_text(config_lib.to_json(config) + '\n')


def open_log(run: Run, built: list[Built], settings: Settings, saved: dict | None,
             changes: dict[str, str]) -> metrics.Logger:
  """The run's log, with what the run is printed at its head."""
  step = saved['step'] if saved else 0
  log = metrics.Logger(
      run.workdir, total_steps=built[-1].phase.last, resumed=step,
      tensorboard=settings.tensorboard, wandb=settings.wandb,
      phase_ends={b.phase.name: b.phase.last for b in built})
  log.summary(describe(run, built, saved, settings.init))
  for phase, change in changes.items():
    log.warn(step, f'{phase}: {change}; as allowed, the phase reads them from their beginning')
  for b in built:
    warn_of_rows(log, b, step)
  return log


def warn_of_rows(log: metrics.Logger, built: Built, step: int) -> None:
  """Says which rows of a phase's data were left out or cut; text phases know it at their end."""
  for fault, (rows, first) in built.left_out().items():
    log.warn(step, f'{built.phase.name}: {rows} rows {fault}; the first: {first}')


def describe(run: Run, built: list[Built], saved: dict | None, init: str) -> list[tuple[str, str]]:
  """The start-up summary: (name, value) lines. init: checkpoint that a new run begins with."""
  devices = jax.devices()
  largest = built[-1].run.specs
  size = lambda table: param.bytes_per_device(table, run.mesh, dict(run.cfg.rules))
  held, gradients = size(largest), size(param.split(largest, largest)[0])
  moments = max(opt_bytes(b) for b in built)
  sizes = [f'{axis} {size}' for axis, size in run.mesh.shape.items() if size > 1]
  kind = run.cfg.attention
  if kind == 'auto':
    chosen = {attention.choose(jax.default_backend(), b.length, size, window)
              for b in built for size, window in reaches(run.cfg)}
    kind = f'auto: {", ".join(sorted(chosen)) or "no layer attends"}'
  recurrent = any(mixer == 'gdn' for mixer, _ in run.cfg.all_layers)
  linear = [('fg2_gdn', recurrence(run.cfg))] if recurrent else []
  grows = [('growth', f'at step {b.phase.first}, from {b.growth.before.run.cfg.moe.experts} '
                      f'to {b.run.cfg.moe.experts} experts a layer, '
                      f'{param.count(largest):,} parameters')
           for b in built if b.growth]
  adapters = []
  if run.cfg.lora.rank:
    adapters = [('adapters', f'{param.count(run.specs["lora"]):,} parameters; the others stay')]
  ahead = heads('' if saved else init, run.cfg)
  resumed = f', resumed at step {saved["step"]}' if saved else ''
  return [
      ('devices', f'{len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es)'),
      ('mesh', ' x '.join(sizes) or 'one device'),
      ('model', f'{param.count(run.specs):,} parameters, {len(run.cfg.layers)} layers, '
                f'compute in {run.cfg.dtype}'),
      *adapters,
      *([('heads', ahead)] if ahead else []),
      ('bytes per device', f'{held:,} parameters + {moments:,} optimiser + '
                           f'{gradients:,} gradients'),
      ('attention', kind),
      *linear,
      *((b.phase.name, f'steps {b.phase.first} to {b.phase.last}, up to {b.tokens:,} tokens a step')
        for b in built),
      *grows,
      ('workdir', f'{run.workdir}{resumed}')]


def heads(init: str, cfg: ModelConfig) -> str:
  """What becomes of heads of multi-token prediction; '': nothing would have any."""
  there = bool(init) and 'mtp' in checkpoint.optional(init)
  if cfg.mtp.depth:
    begin = f', of {init}' if there else f', fresh: {init} has none' if init else ''
    return f'{cfg.mtp.depth} for multi-token prediction{begin}'
  if there:
    return f'those of {init} are left out, as model.mtp.depth is 0'
  return hf_files.heads(init) if init and hf_files.is_folder(init) else ''


def reaches(cfg: ModelConfig) -> list[tuple[int, int]]:
  """(head size, window) of the layers that attend; the larger size where keys and values differ."""
  m, mixers = cfg.mla_sizes, {mixer for mixer, _ in cfg.all_layers}
  kinds = {'attention': (cfg.head_dim, 0), 'local': (cfg.head_dim, cfg.window),
           'mla': (max(m.nope_dim + m.rope_dim, m.value_dim), 0)}
  return [kind for mixer, kind in kinds.items() if mixer in mixers]


def recurrence(cfg: ModelConfig) -> str:
  """Which form of the delta rule runs, of which variant."""
  g, on = cfg.gdn, jax.default_backend()
  form = (f'auto: {fg2_gdn.choose(on, cfg.dtype)}' if g.implementation == 'auto'
          else g.implementation)
  return f'{g.variant}, {form}, chunks of {g.chunk or fg2_gdn.CHUNK[on]} tokens'


def opt_bytes(built: Built) -> int:
  """Bytes of optimiser state one device holds."""
  state = phases.abstract_state(built).opt_state
  return sum(int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
             for x in jax.tree.leaves(state))


def make_hooks(run: Run, built: list[Built], settings: Settings,
               checkpoints: checkpoint.Checkpointer, log: metrics.Logger, stop: loop.StopSignal,
               config: Any) -> loop.Hooks:
  """What the loop may do, tied to this run's files."""
  base = {'phases': list(config.phases), 'config': json.loads(config_lib.to_json(config)),
          'contracts': {b.phase.name: b.contract for b in built},
          **models.to_meta(settings.origin)}
  peak = metrics.peak_flops(jax.devices())

  def save(step, phase, state, memory, values, wait):
    meta = base | {'phase': phase.name, 'first': phase.first}
    checkpoints.save(step, state, memory, meta, metrics=values, wait=wait)

  def due(step, values):
    return step % settings.save_every == 0 or settings.best_metric in values

  def write(step, phase, values, tokens, seconds):
    checkpoints.check()
    if seconds:
      values = values | {'tokens_per_second': tokens / seconds, 'seconds': seconds}
      if peak:
        values['mfu'] = tokens / seconds * phase.flops_per_token / peak
      if (step - phase.first) % settings.log_every and step != phase.last:
        return
    log.log(step, values, phase=phase.name)

  def dump(step, batch):
    path = run.workdir / f'bad_batch_{step}.npz'
    batch = mesh_lib.gather(batch)
    return loop.dump_batch(str(path), batch) if jax.process_index() == 0 else str(path)

  def agree(flag):
    return flag if jax.process_count() == 1 else bool(mesh_lib.sum_over_processes(float(flag)) > 0)

  return loop.Hooks(
      save=save, finite=lambda state: bool(finite(state)), due=due, log=write, warn=log.warn,
      show=lambda step, phase, rows: log.samples(step, rows, phase=phase.name), dump=dump,
      stop=stop, agree=agree)


def export(run: Run, settings: Settings, params: Any, tokenizer: str) -> None:
  """Writes the model as a Hugging Face folder, for other engines."""
  array = lora.merging(param.flat(params).__getitem__, run.specs, run.cfg.lora)
  hf_files.save(settings.export, run.cfg, lambda path: mesh_lib.gather(array(path)),
                origin=settings.origin, tokenizer='' if tokenizer == 'bytes' else tokenizer,
                ids=models.special_ids(tokenizer))
  if jax.process_index() == 0:
    print(f'export: {settings.export}')


def finish(run: Run) -> None:
  """Writes the report and prints the table of before and after."""
  if jax.process_index() == 0:
    path = report_lib.build([str(run.workdir)])
    print(report_lib.before_after([str(run.workdir)]))
    print(f'report: {path}')
