"""The optimiser: clip, AdamW or Muon, decay of matrices, and a learning rate that is data.

Which array is a matrix, and between which of its axes, is read off the parameter table
(nn.param.Spec.contract).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax import contrib

from nn import param
from nn.param import Spec

Tree = Any


def make(
    specs: Tree,
    *,
    name: str = 'adamw',
    weight_decay: float = 0.0,
    clip: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    muon_beta: float = 0.95,
    muon_steps: int = 5,
    muon_rms: float = 0.2,
    adam_rate: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
  """The gradient transformation over the trainable parameters.

  An update is -learning_rate * ratio * (direction + weight_decay * parameter). learning_rate is an
  extra argument of `update`, a scalar: it is data like every schedule, and never in the state.

  Args:
    specs: the model's table, nested dict of Spec.
    name: adamw, or muon: matrices by Muon (optax.contrib), everything else by Adam.
    weight_decay: of arrays with a contract, which gains, biases and embedding tables do not have.
    clip: the gradient is scaled down to this global norm; 0: never.
    b1, b2, eps: Adam's.
    muon_beta: memory of Muon's mean.
    muon_steps: Newton-Schulz iterations.
    muon_rms: root mean square of Muon's direction (arXiv:2502.16982, eq. 4), so that one learning
      rate suits Adam's arrays too; 0: its own width scaling, sqrt(max(1, outputs / inputs)).
    adam_rate: ratio for the arrays Muon leaves to Adam; 1 otherwise.
  """
  if name not in ('adamw', 'muon'):
    raise ValueError(f'optimizer.name is {name!r}, wanted adamw or muon')
  table, _ = param.split(specs, specs)
  adam = optax.scale_by_adam(b1, b2, eps)
  if name == 'muon':
    names = jax.tree.map(lambda s: 'muon' if is_matrix(s) else 'adam', table)
    ratios = jax.tree.map(lambda s: 1.0 if is_matrix(s) else adam_rate, table)
    numbers = jax.tree.map(
        lambda s: dimension_numbers(s) if is_matrix(s) else optax.MaskedNode(), table)
    muon = contrib.scale_by_muon(
        beta=muon_beta, ns_steps=muon_steps, eps=eps, weight_dimension_numbers=numbers)
    sizes = jax.tree.map(lambda s: muon_scale(s, muon_rms) if is_matrix(s) else 1.0, table)
    resize = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, sizes))
    direction = [optax.partition({'muon': muon, 'adam': adam}, names), resize]
  else:
    ratios = jax.tree.map(lambda s: 1.0, table)
    direction = [adam]
  decayed = jax.tree.map(lambda s: bool(s.contract), table)
  return optax.chain(
      *([optax.clip_by_global_norm(clip)] if clip else []),
      *direction,
      optax.add_decayed_weights(weight_decay, decayed),
      scale_by_rate(ratios))


def is_matrix(spec: Spec) -> bool:
  """Whether Muon takes it. The unembedding is left to Adam, like the embedding."""
  return bool(spec.contract) and 'vocab' not in spec.axes


def dimension_numbers(spec: Spec) -> contrib.MuonDimensionNumbers:
  """Inputs and outputs of the matrix; layers and experts are many matrices."""
  inputs = tuple(i for i, axis in enumerate(spec.axes) if axis in spec.contract)
  others = (*spec.contract, 'layers', 'expert')
  outputs = tuple(i for i, axis in enumerate(spec.axes) if axis not in others)
  return contrib.MuonDimensionNumbers(inputs, outputs)


def muon_scale(spec: Spec, rms: float) -> float:
  """What an orthogonal direction is multiplied by, see make."""
  numbers = dimension_numbers(spec)
  inputs = math.prod(spec.shape[i] for i in numbers.reduction_axis)
  outputs = math.prod(spec.shape[i] for i in numbers.output_axis)
  return rms * math.sqrt(max(inputs, outputs)) if rms else math.sqrt(max(1.0, outputs / inputs))


def scale_by_rate(ratios: Tree) -> optax.GradientTransformationExtraArgs:
  """Multiplies by minus the extra argument learning_rate, and by every array's own ratio."""

  def update(updates, state, params=None, *, learning_rate, **others):
    del params, others                 # optax hands every extra argument to every part of a chain
    return jax.tree.map(lambda u, r: -learning_rate * r * u, updates, ratios), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def state_shardings(
    tx: optax.GradientTransformation, specs: Tree, shardings: Tree, mesh: Mesh) -> Tree:
  """Shardings of tx's state: moments lie where their parameters lie, counts are everywhere.

  To be given as out_shardings to the jitted tx.init, which otherwise silently replicates them.

  Args:
    shardings: of all parameters, shaped like specs.
  """
  trainable, _ = param.split(shardings, specs)
  state = jax.eval_shape(tx.init, param.abstract(param.split(specs, specs)[0]))
  everywhere = NamedSharding(mesh, PartitionSpec())
  masked = lambda x: isinstance(x, optax.MaskedNode)
  return optax.tree.map_params(
      tx, lambda moment, where: moment if masked(moment) else where, state, trainable,
      transform_non_params=lambda _: everywhere, is_leaf=masked)


def map_moments(tx: optax.GradientTransformation, f: Callable, state: Tree, *trees: Tree) -> Tree:
  """The state with f(moment, *leaves) for every moment; counts stay.

  Args:
    trees: shaped like the trainable parameters; their leaves of the moment's parameter go to f.
  """
  masked = lambda x: isinstance(x, optax.MaskedNode)
  return optax.tree_map_params(
      tx, lambda moment, *leaves: moment if masked(moment) else f(moment, *leaves), state, *trees,
      is_leaf=masked)


def mean_squares(state: Tree) -> Tree:
  """Adam's mean squares, shaped like the trainable parameters; MaskedNodes where Muon rules."""
  is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
  return next(x.nu for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x))


def schedule(kind: str, *, peak: float, steps: int, warmup: int = 0, decay: int = 0,
             floor: float = 0.0) -> Callable[[int], float]:
  """The learning rate of step 0, 1, ... of a phase. It rises over `warmup` steps in every kind.

  Args:
    kind: constant; wsd, falling in a line over the last `decay` steps; cosine, from the warm-up on.
    peak: the highest rate.
    steps: of the phase.
    warmup: steps below the peak at the start.
    decay: steps below the peak at the end.
    floor: what wsd and cosine fall to, as a share of the peak: the rate of step `steps` and later.
  """
  if kind not in ('constant', 'wsd', 'cosine'):
    raise ValueError(f'optimizer.schedule is {kind!r}, wanted constant, wsd or cosine')
  numbers = {'learning_rate': peak, 'warmup': warmup, 'decay': decay, 'floor': floor}
  if floor > 1 or not all(0 <= x < math.inf for x in numbers.values()):
    raise ValueError(f'optimizer: {numbers}, wanted finite numbers of at least 0, floor at most 1')

  def rate(step: int) -> float:
    rise = min(1.0, (step + 1) / (warmup + 1))
    fall = 1.0
    if kind == 'wsd':
      fall = min(1.0, max(0.0, (steps - step) / (decay + 1)))
    elif kind == 'cosine':
      done = min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
      fall = 0.5 * (1 + math.cos(math.pi * done))
    return peak * rise * (floor + (1 - floor) * fall)

  return rate


def from_config(
    specs: Tree, o: Any, steps: int) -> tuple[optax.GradientTransformationExtraArgs, Callable]:
  """The transformation and the schedule of a phase; reads only the options that its choices use.

  Args:
    o: the config's block optimizer.
    steps: of the phase.
  """
  own = {}
  if o.name == 'muon':
    own = {key: o[key] for key in ('muon_beta', 'muon_steps', 'muon_rms', 'adam_rate')}
  tx = make(specs, name=o.name, weight_decay=o.weight_decay, clip=o.clip, b1=o.b1, b2=o.b2,
            eps=o.eps, **own)
  bend = {'wsd': ('decay', 'floor'), 'cosine': ('floor',)}.get(o.schedule, ())
  rate = schedule(o.schedule, peak=o.learning_rate, steps=steps, warmup=o.warmup,
                  **{key: o[key] for key in bend})
  return tx, rate
