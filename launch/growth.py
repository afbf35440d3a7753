"""Growing the experts of a training state (moe/upcycle.py), within a run or between two.

L layers, E experts of each, m times as many after growth.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from launch import charts, checkpoint, history, optimizer
from launch import config as config_lib
from launch import step as step_lib
from moe import upcycle
from nn import model, param
from nn.config import ModelConfig
from rl.names import unknown

DOCUMENT, PLOT = history.GROWTH, 'upcycle.svg'
GRADIENTS = ('grad_sq', 'saliency', 'fisher')        # selections that need them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How; see configs/base.py, upcycle. What a choice does not use has its default here."""
  factor: int
  selection: str
  optimizer: str
  seed: int
  score_batches: int = 0
  allocation: str = 'greedy'
  cap: int = 1
  temperature: float = 1.0
  noise: float = 0.0
  router_noise: float = 0.0


@dataclasses.dataclass(frozen=True)
class Choice:
  """Whom to copy."""
  index: dict[str, np.ndarray]                # of moe.upcycle.select
  scores: dict[str, np.ndarray] | None        # None: uniform


def read_options(config: Any, cfg: ModelConfig) -> Options:
  """The options of a run's config, checked; reads only what its choices use."""
  u, more = config.upcycle, {}
  if u.selection not in upcycle.SELECTIONS:
    raise ValueError('upcycle.selection: ' + unknown('one', u.selection, upcycle.SELECTIONS))
  config_lib.at_least(1, config, 'upcycle.factor')
  if u.selection == 'fresh':             # nothing of the others is kept, so the rest has no effect
    return Options(factor=u.factor, selection='fresh', optimizer='reset', seed=config.seed)
  if u.optimizer not in upcycle.OPTIMIZERS:
    raise ValueError('upcycle.optimizer: ' + unknown('one', u.optimizer, upcycle.OPTIMIZERS))
  if u.selection in GRADIENTS:
    config_lib.at_least(1, config, 'upcycle.score_batches')
    more['score_batches'] = u.score_batches
  if u.selection != 'uniform':
    if u.allocation not in ('greedy', 'weighted'):
      raise ValueError(f'upcycle.allocation is {u.allocation!r}, wanted greedy or weighted')
    own = {'greedy': 'cap', 'weighted': 'temperature'}[u.allocation]
    more |= {'allocation': u.allocation, own: u[own]}
    if own == 'cap':
      config_lib.at_least(1, config, 'upcycle.cap')
    elif u.temperature <= 0:
      raise ValueError(f'upcycle.temperature is {u.temperature}, wanted more than 0')
  noise = 'noise' if cfg.moe.has_bias else 'router_noise'
  config_lib.at_least(0, config, f'upcycle.{noise}')
  more[noise] = u[noise]
  return Options(factor=u.factor, selection=u.selection, optimizer=u.optimizer, seed=config.seed,
                 **more)


def check(o: Options, specs: Any, opt_state: Any) -> None:
  """Refuses what cannot be grown so.

  Args:
    specs, opt_state: of the model before; the state may be abstract.
  """
  if not upcycle.layers(specs):
    raise ValueError('the model has no experts to copy: it is dense')
  if 'lora' in specs:
    raise ValueError('experts under adapters are frozen and cannot grow; merge the adapters first, '
                     'by launch/adapters.py --merged, and leave model.lora out')
  squares = param.flat(optimizer.mean_squares(opt_state))
  if o.selection == 'fisher' and not all(
      hasattr(squares[name], 'shape') for name, s in param.flat(specs).items()
      if 'expert' in s.axes and s.trainable):
    raise ValueError("selection 'fisher' divides by Adam's mean squares, and this optimiser keeps "
                     "none of the experts: Muon trains them; take 'grad_sq'")


def grown(cfg: ModelConfig, factor: int) -> ModelConfig:
  """The model with m times the experts."""
  return dataclasses.replace(cfg, moe=upcycle.grown(cfg.moe, factor))


def model_at(config: Any, vocab_size: int, step: int) -> ModelConfig:
  """The model of a run's checkpoint: that of the step of growth is saved before it."""
  cfg = config_lib.model_config(config.model, vocab_size)
  return grown(cfg, config.upcycle.factor) if 0 < config.upcycle.at_step < step else cfg


def choose(o: Options, cfg: ModelConfig, specs: Any, state: step_lib.TrainState,
           gradients: Iterable[Any]) -> Choice:
  """Whom to copy.

  Args:
    gradients: of the trainable parameters, each of one optimiser step; only read if needed.
  """
  found = None
  if o.selection not in ('uniform', 'fresh'):
    second = optimizer.mean_squares(state.opt_state) if o.selection == 'fisher' else None
    several = [None] if o.selection == 'weight' else gradients
    found = upcycle.average([
        upcycle.scores(o.selection, specs, state.params, one, second) for one in several])
    if bad := [name for name, score in found.items() if not np.isfinite(score).all()]:
      raise ValueError(f'the scores of {bad[0]} are not finite, so nothing can be chosen by them')
  return Choice(upcycle.select(
      specs, o.factor, score=found, allocation=o.allocation, cap=o.cap, temperature=o.temperature,
      groups=cfg.moe.groups, seed=o.seed), found)


def make_grow(o: Options, tx: Any, specs: Any, after: Any, shardings: step_lib.TrainState,
              index: Mapping[str, np.ndarray]) -> Callable:
  """state -> the state of the grown model, jitted. The state before stays as it is.

  Args:
    tx: the optimiser; one of either model.
    specs, after: tables before and after.
    shardings: after.
  """
  names = lambda tree: param.unflat({name: name for name in param.flat(tree)})
  places = param.flat(spread(after, shardings.params))

  def apart(tree):
    return param.unflat({
        name: jax.lax.with_sharding_constraint(a, places[name]) if name in places else a
        for name, a in param.flat(tree).items()})

  def one(state):
    old = apart(state.params)
    new = grow_params(o, specs, after, old, index, apart)

    def moment(a, name, before, now):
      alone = lambda leaf: apart(param.unflat({name: leaf}))
      found = upcycle.grow_moments(
          alone(a), specs, index, o.optimizer, alone(before), alone(now))
      return param.flat(apart(found))[name]

    trainable = lambda tree: param.split(tree, specs)[0]
    opt_state = optimizer.map_moments(
        tx, moment, state.opt_state, names(trainable(specs)), trainable(old), trainable(new))
    return step_lib.TrainState(state.updates, new, opt_state)

  return jax.jit(one, out_shardings=shardings)


def grow_params(o: Options, specs: Any, after: Any, params: Any, index: Mapping[str, np.ndarray],
                place: Callable = lambda tree: tree) -> Any:
  """The grown model's parameters, its copies told apart. place: constrains where they lie."""
  copied = place(upcycle.grow(params, specs, index))
  if o.selection == 'fresh':
    return upcycle.renew(copied, after, index, o.seed)
  return upcycle.perturb(
      copied, after, index, noise=o.noise, router_noise=o.router_noise, seed=o.seed)


def spread(specs: Any, shardings: Any) -> Any:
  """Where arrays with experts lie while experts are taken: split as finely, over other axes.

  With the expert axis whole on a device no array is gathered: going there and back is one exchange.
  Arrays that no other axis of which can be split that far are small, and left out.
  """
  places = {}
  for name, s in param.flat(specs).items():
    where = param.flat(shardings)[name]
    parts = [(part,) if isinstance(part, str) else tuple(part or ()) for part in where.spec]
    parts += [()] * (len(s.shape) - len(parts))
    if 'expert' not in s.axes or not parts[s.axes.index('expert')]:
      continue
    at = s.axes.index('expert')
    split = lambda i: int(np.prod([where.mesh.shape[m] for m in parts[i] + parts[at]]))
    others = [i for i in range(len(parts)) if s.axes[i] not in ('expert', 'layers')
              and s.shape[i] % split(i) == 0]
    if others:
      parts[others[0]] += parts[at]
      parts[at] = ()
      places[name] = NamedSharding(where.mesh, PartitionSpec(*(part or None for part in parts)))
  return param.unflat(places)


# ---- What was done

def document(*, step: int, origin: str, how: Mapping[str, Any], cfg: ModelConfig,
             choice: Choice) -> dict[str, Any]:
  """What upcycle.json says.

  Args:
    step: of the run, at which the model grew.
    origin: where the model before was.
    how: the options.
    cfg: of either model.
  """
  indices = {'/'.join(place): found for place, found in model.by_layer(cfg)}
  layers = {}
  for name, index in choice.index.items():
    scores = None if choice.scores is None else choice.scores[name]
    layers[name] = {
        'layers': list(indices['/'.join(name.split('/')[:2])]), 'sources': index.tolist(),
        'copies': copies(index).tolist(), 'scores': None if scores is None else scores.tolist()}
  return {'step': step, 'from': origin, 'how': dict(how), **checkpoint.provenance(),
          'layers': layers}


def copies(index: np.ndarray) -> np.ndarray:
  """How many of the grown model's experts are grown from each of the E: [..., m E] -> [..., E]."""
  return np.apply_along_axis(np.bincount, -1, index, None, index.max() + 1)


def write(workdir: Path, found: Mapping[str, Any]) -> None:
  """upcycle.json and the plot of it: experts by layer, and how many there are of each now."""
  if jax.process_index() > 0:
    return
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / DOCUMENT).write_text(json.dumps(found, indent=1) + '\n')
  rows = {}
  for layer in found['layers'].values():
    rows |= dict(zip(layer['layers'], np.atleast_2d(layer['copies'])))
  order = sorted(rows)
  (workdir / PLOT).write_text(charts.heatmap(
      np.stack([rows[i] for i in order]), [str(i) for i in order], 'expert before growth', 'layer',
      'experts grown from it'))


def read(workdir: Path) -> dict[str, Any]:
  """What upcycle.json says; ValueError if there is none."""
  path = workdir / DOCUMENT
  if not path.is_file():
    raise ValueError(f'{workdir} has no {DOCUMENT}: no model was grown there')
  return json.loads(path.read_text())


def index_of(found: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The index that a document tells of."""
  return {name: np.array(layer['sources'], np.int32) for name, layer in found['layers'].items()}
