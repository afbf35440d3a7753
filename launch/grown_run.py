"""A run that goes on from another one with more experts: what launch/upcycle.py is made of."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import base
from data import tokenizer as tokenizer_lib
from launch import charts, checkpoint, growth, page, phases, start
from launch import config as config_lib
from launch import mesh as mesh_lib
from launch import step as step_lib
from moe import upcycle
from nn import model, param

CARRIED = ('phases', 'contracts', 'phase')       # of a checkpoint's meta data
MOE = 'model.moe.'
COMPARISON = 'divergence.html'


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint that is to be grown, and where to."""
  folder: Path
  output: Path
  meta: dict
  stored: ConfigDict               # the run's config
  overrides: Sequence[tuple[str, str]]
  other: bool                      # run.config is of a file, not the stored one
  run: phases.Run                  # with the model of the checkpoint


def open_source(path: str, output: str, config: str,
                overrides: Sequence[tuple[str, str]]) -> Source:
  """The checkpoint that a path means; reads no arrays and writes nothing.

  Args:
    config: file of the config that data and mesh are taken from; '': the stored one.
    overrides: of that config; see launch/config.py.
  """
  folder, to = checkpoint.find(path), Path(output)
  if steps := checkpoint.whole_steps(to / checkpoint.FOLDER):
    raise ValueError(f'{output} has checkpoints already, of steps {steps}; take another folder')
  meta = checkpoint.read_meta(folder)
  if 'config' not in meta:
    raise ValueError(f'{folder} holds parameters alone, without config, data and optimiser; give '
                     'the folder of a run')
  stored = config_lib.from_json(json.dumps(meta['config']))
  used = config_lib.load(config, overrides) if config else overridden(stored, overrides)
  tokenizer = tokenizer_lib.load(stored.tokenizer)
  cfg = growth.model_at(used if config else stored, tokenizer.vocab_size, meta['step'])
  checkpoint.check_params(folder, param.abstract(model.specs(cfg)))
  tracked = config_lib.Tracked(used)
  mesh = mesh_lib.make_mesh(tracked.mesh.to_dict())
  run = phases.Run(
      tracked, cfg, model.specs(cfg), mesh, tokenizer, to, jax.random.key(used.seed))
  return Source(folder, to, meta, stored, overrides, bool(config), run)


def overridden(config: ConfigDict, overrides: Sequence[tuple[str, str]]) -> ConfigDict:
  """A copy with some leaves set."""
  copy = ConfigDict(config.to_dict()).lock()
  for key, text in overrides:
    config_lib.override(copy, key, text)
  return copy


def grow(s: Source, given: Mapping[str, str], seed: int | None) -> None:
  """Writes the run with more experts.

  Args:
    given: options of the command line, as in the block upcycle of a config.
    seed: None: the run's.
  """
  if not upcycle.layers(s.run.specs):
    raise ValueError(f'{s.folder} is a dense model, without experts; --dense makes it a mixture')
  settings = overridden(base.get_config(), [(f'upcycle.{k}', text) for k, text in given.items()])
  with settings.unlocked():
    settings.seed = s.stored.seed if seed is None else seed
    settings.model.moe.bias_rate = s.run.cfg.moe.bias_rate       # for what may be said of noise
    settings.model.moe.bias = s.run.cfg.moe.bias
  tracked = config_lib.Tracked(settings)
  o = growth.read_options(tracked, s.run.cfg)
  config_lib.refuse_unread(tracked, [f'upcycle.{name}' for name in given])

  after = with_model(s.run, growth.grown(s.run.cfg, o.factor))
  tx, _, before = optimizer_of(s, s.run)
  _, shardings, _ = optimizer_of(s, after)
  growth.check(o, s.run.specs, before.opt_state)
  try:
    built = scored_phase(s) if o.score_batches else None
    check_overrides(s, ())
    state, memory = checkpoint.load_state(s.folder, before), checkpoint.load_memory(s.folder)
    place = memory if built and same_data(s, built) else {}
    gradients = start.gradients(built, place, state.params, o.score_batches) if built else ()
    choice = growth.choose(o, s.run.cfg, s.run.specs, state, gradients)
  finally:
    s.run.close()
  grown = growth.make_grow(o, tx, s.run.specs, after.specs, shardings, choice.index)(state)
  make = lambda params: growth.grow_params(o, s.run.specs, after.specs, params, choice.index)
  changes = {'model.moe.experts': after.cfg.moe.experts}
  write(s, after, changes, grown, memory, make, dataclasses.asdict(o), choice)


def make_sparse(s: Source, experts: int, top_k: int, slices: int, seed: int | None) -> None:
  """Writes the run with experts in place of every FFN that a layer does not name itself."""
  if upcycle.layers(s.run.specs):
    raise ValueError(f'{s.folder} has experts already; --dense is for models without, --factor for '
                     'these')
  if s.run.cfg.ffw_dim % slices:
    raise ValueError(f'model.ffw_dim {s.run.cfg.ffw_dim} cannot be cut into {slices} slices')
  moe = [(key, text) for key, text in s.overrides if key.startswith(MOE)]
  config = overridden(s.stored, moe)
  changes = {key: config_lib.flat(config)[key] for key, _ in moe}
  changes |= {'model.ffn': 'moe', MOE + 'experts': experts, MOE + 'top_k': top_k,
              MOE + 'ffw_dim': s.run.cfg.ffw_dim // slices, MOE + 'scale': float(slices)}
  config = changed(s.stored, changes)
  after = with_model(s.run, config_lib.model_config(config.model, s.run.tokenizer.vocab_size))
  key = jax.random.key(s.stored.seed if seed is None else seed)
  make = lambda params: upcycle.from_dense(
      params, s.run.specs, after.specs, after.cfg.moe, key, slices)
  jax.eval_shape(make, param.abstract(s.run.specs))           # refuses what does not fit
  _, _, before = optimizer_of(s, s.run)
  tx, shardings, _ = optimizer_of(s, after)
  check_overrides(s, [key for key, _ in moe])

  state, memory = checkpoint.load_state(s.folder, before), checkpoint.load_memory(s.folder)

  def one(state):
    params = make(state.params)
    return step_lib.TrainState(
        state.updates, params, tx.init(param.split(params, after.specs)[0]))

  sparse = jax.jit(one, out_shardings=shardings)(state)
  index = {name: np.broadcast_to(np.arange(shape[-1], dtype=np.int32) % slices, shape)
           for name, shape in upcycle.layers(after.specs).items()}
  how = {'dense': True, 'experts': experts, 'top_k': top_k, 'slices': slices}
  write(s, after, changes, sparse, memory, make, how, growth.Choice(index, None))


def with_model(run: phases.Run, cfg: Any) -> phases.Run:
  return dataclasses.replace(run, cfg=cfg, specs=model.specs(cfg))


def optimizer_of(
    s: Source, run: phases.Run,
) -> tuple[Any, step_lib.TrainState, step_lib.TrainState]:
  """The checkpoint's phase's optimiser; shardings and abstract state, with the model of the run."""
  tx, _, shardings = phases.build_optimizer(run, s.stored[s.meta['phase']], 1)
  return tx, shardings, phases.abstract(run.specs, tx, shardings)


def scored_phase(s: Source) -> phases.Built:
  """The phase whose data gradients are taken of."""
  text = [name for name in s.run.config.phases if name != 'rl']
  name = s.meta['phase']
  if name not in text:
    if not text or not s.other:
      raise ValueError(
          f'gradients are taken of a phase of text, and {s.folder} is of phase {name}: give '
          '--config with a phase pretrain or sft, or take --selection uniform or weight')
    name = text[-1]
  return phases.build(s.run, name, 0, max(1, s.run.config[name].steps))


def same_data(s: Source, built: phases.Built) -> bool:
  """Whether the checkpoint's place is one in the phase's data."""
  name = built.phase.name
  try:
    if name != s.meta['phase']:
      raise ValueError(f'the checkpoint is of phase {s.meta["phase"]}, the data of {name}')
    built.check(s.meta['contracts'][name])
  except ValueError as error:
    print(f'gradients are taken from the beginning of the data: {error}', file=sys.stderr)
    return False
  return True


def check_overrides(s: Source, used: Sequence[str]) -> None:
  """Refuses overrides that nothing has read."""
  config_lib.refuse_unread(s.run.config, [key for key, _ in s.overrides if key not in used])


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
  """A copy of a stored config with some leaves of other values."""
  copy = ConfigDict(config.to_dict())
  for key, value in changes.items():
    *path, name = key.split('.')
    block = copy
    for part in path:
      block = block[part]
    block[name] = value
  return copy.lock()


def write(s: Source, after: phases.Run, changes: Mapping[str, Any], state: step_lib.TrainState,
          memory: Any, make: Callable, how: Mapping[str, Any], choice: growth.Choice) -> None:
  """The new workdir: what was done, the reference policy if there is one, and the checkpoint.

  Args:
    changes: {key: value} of the stored config.
    make: params -> grown params, to be jitted.
  """
  step, phase = s.meta['step'], s.meta['phase']
  if 0 < s.stored.upcycle.at_step < step:        # it has grown before, within the run
    changes = changes | {f'upcycle.{k}': v for k, v in base.get_config().upcycle.items()}
  config = changed(s.stored, changes)
  growth.write(s.output, growth.document(
      step=step, origin=str(s.folder), how=how, cfg=after.cfg, choice=choice))
  reference = s.folder.parent.parent / 'reference'
  if phase == 'rl' and reference.is_dir():
    params = checkpoint.load_params(reference, param.abstract(s.run.specs, s.run.shardings))
    params = jax.jit(make, out_shardings=after.shardings)(params)
    checkpoint.save_params(s.output / 'reference', params, {'from': str(reference)})
  first = next(first for name, first, last in phases.plan(config) if name == phase and step <= last)
  meta = {name: s.meta[name] for name in CARRIED} | {
      'first': first, 'config': json.loads(config_lib.to_json(config))}
  with checkpoint.Checkpointer(s.output, keep=1) as checkpoints:
    checkpoints.save(step, state, memory, meta, wait=True)
  start.write_config(after, config)
  settings = ' '.join(f'--config.{key}={value}' for key, value in changes.items())
  print(f'{s.output}: step {step} of phase {phase}, {param.count(s.run.specs):,} parameters became '
        f'{param.count(after.specs):,}; go on with {settings}')


# ---- What became of the copies

def compare(workdir: str, overrides: Sequence[tuple[str, str]]) -> str:
  """A table of how like their originals copies are in every checkpoint; also as a page there."""
  folder, found = Path(workdir), growth.read(Path(workdir))
  index, values = growth.index_of(found), {}
  for step in checkpoint.whole_steps(folder / checkpoint.FOLDER):
    at = folder / checkpoint.FOLDER / str(step)
    config = overridden(config_lib.from_json(json.dumps(checkpoint.read_meta(at)['config'])),
                        overrides)
    cfg = growth.model_at(config, tokenizer_lib.load(config.tokenizer).vocab_size, step)
    specs, mesh = model.specs(cfg), mesh_lib.make_mesh(config.mesh.to_dict())
    if {k: i.shape for k, i in index.items()} != upcycle.layers(specs):
      continue                                   # of before the growth
    with jax.set_mesh(mesh):
      places = param.shardings(specs, mesh, dict(cfg.rules))
      params = checkpoint.load_params(at, param.abstract(specs, places))
      values[step] = by_layer(found, upcycle.similarity(params, specs, index), index)
  if not values:
    raise ValueError(f'{workdir} has no checkpoint of the grown model')
  header = ['step', 'layer', 'mean cosine', 'least']
  rows = [[str(step), str(layer), f'{np.mean(x):.4f}', f'{np.min(x):.4f}']
          for step, layers in values.items() for layer, x in layers.items() if len(x)]
  steps, layers = np.array(list(values)), list(values[min(values)])
  series = [charts.Series(steps, np.array([np.mean(values[s][layer]) for s in values]), i, True)
            for i, layer in enumerate(layers)]
  chart = page.figure('Mean cosine of copies with their originals',
                      charts.draw('Mean cosine of copies', series),
                      [(f'layer {layer}', i) for i, layer in enumerate(layers)])
  (folder / COMPARISON).write_text(page.document(f'Copies in {folder.name}', [
      page.heading(f'Copies in {folder.name}', [f'grown at step {found["step"]}']),
      page.grid([chart]), page.section('Every checkpoint', page.table([header, *rows]))]))
  return '\n'.join('  '.join(cell.rjust(11) for cell in row) for row in [header, *rows])


def by_layer(found: Mapping[str, Any], cosines: Mapping[str, np.ndarray],
             index: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
  """{layer of the model: cosines of its copies}, in order."""
  out = {}
  for name, layer in found['layers'].items():
    rows, copies = np.atleast_2d(cosines[name]), np.atleast_2d(upcycle.is_copy(index[name]))
    out |= {i: row[is_copy] for i, row, is_copy in zip(layer['layers'], rows, copies)}
  return dict(sorted(out.items()))
