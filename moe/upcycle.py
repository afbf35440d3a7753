"""Growing the experts of a trained model, and making a mixture of a dense one.

The first is arXiv:2604.19835, the second arXiv:2212.05055. E experts become m E; K, the experts of
a token, stays, and with it the work per token. A layer here is the entry of the parameter table
that holds a router and its experts, by name ('blocks/0/ffn'); where the table is stacked over R
repeats, each of them has experts, scores and copies of its own, and arrays [E, ...] below are
[R, E, ...].

What is copied from where is one index array per layer. Parameters, averages of them and optimiser
moments are all grown by it.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nn import param
from nn.config import MoE
from nn.param import Spec, Tree

FIRST = ('gate', 'up')                 # an expert's first matrix: what scores look at by default
SELECTIONS = ('uniform', 'fresh', 'grad_sq', 'saliency', 'fisher', 'weight')
OPTIMIZERS = ('copy', 'reset', 'scale')


def layers(specs: Tree) -> dict[str, tuple[int, ...]]:
  """{layer: (E,), or (R, E) where it is stacked}, in the order of the table."""
  found = {}
  for name, spec in param.flat(specs).items():
    if 'expert' in spec.axes:
      lead = spec.shape[:1] if 'layers' in spec.axes else ()
      found[layer_of(name)] = (*lead, spec.shape[spec.axes.index('expert')])
  return found


def layer_of(name: str) -> str:
  return name.rpartition('/')[0]


# ---- Whom to copy

def scores(
    kind: str, specs: Tree, params: Tree, grads: Tree | None = None, second: Tree | None = None,
    arrays: Sequence[str] = FIRST,
) -> dict[str, np.ndarray]:
  """What every expert is worth copying, {layer: [E] float64}.

  Args:
    kind: grad_sq, |g|^2; saliency, |W| |g|; fisher, |g|^2 / (|v| + 1e-8); weight, |W|. Norms are
      over all of an expert's `arrays` together.
    params, grads, second: W, its gradient, accumulated over one optimiser step, and Adam's mean
      square v; each is needed by the kinds that name it only. Several batches: `average` of their
      scores.
  """
  needed = {
      'grad_sq': (grads,), 'saliency': (params, grads), 'fisher': (grads, second),
      'weight': (params,)}
  if kind not in needed:
    raise ValueError(f'unknown scores {kind!r}; known are {", ".join(needed)}')
  if any(tree is None for tree in needed[kind]):
    raise ValueError(f'scores {kind!r} need '
                     f'{"gradients and second moments" if kind == "fisher" else "gradients"}')
  squares = [expert_squares(tree, specs, arrays) for tree in needed[kind]]
  if kind == 'grad_sq':
    return squares[0]
  combine = {
      'weight': np.sqrt,
      'saliency': lambda w, g: np.sqrt(w * g),
      'fisher': lambda g, v: g / (np.sqrt(v) + 1e-8),
  }[kind]
  return {name: combine(*(s[name] for s in squares)) for name in squares[0]}


def expert_squares(tree: Tree, specs: Tree, arrays: Sequence[str]) -> dict[str, np.ndarray]:
  """Sum of squares of every expert over its arrays of these names: {layer: [E] float64}."""
  table, leaves = param.flat(specs), param.flat(tree)
  out = {}
  for name in table:
    layer, _, last = name.rpartition('/')
    if last in arrays and 'expert' in table[name].axes:
      kept = [table[name].axes.index(a) for a in ('layers', 'expert') if a in table[name].axes]
      others = tuple(i for i in range(len(table[name].shape)) if i not in kept)
      out[layer] = out.get(layer, 0) + np.asarray(
          dots(leaves[name], leaves[name], others), np.float64)
  return out


@functools.partial(jax.jit, static_argnums=2)
def dots(a: jax.Array, b: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """The sum of a b over the axes, whole on every device."""
  found = jnp.sum(a * b, axis=axes)
  return param.constrain(found, (), *[None] * found.ndim)


def average(several: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """The mean of the scores of several batches."""
  return {name: np.mean([one[name] for one in several], axis=0) for name in several[0]}


def uniform(num_experts: int, num_new: int) -> np.ndarray:
  """Everyone in turn: [num_new] int."""
  return np.arange(num_new) % num_experts


def greedy(score: np.ndarray, num_new: int, cap: int) -> np.ndarray:
  """The best expert until it has `cap` copies, then the next: [E] -> [num_new] int.

  All once more if that is not enough.
  """
  order = np.argsort(-score, kind='stable')
  return np.resize(np.repeat(order, cap), num_new)


def weighted(score: np.ndarray, num_new: int, temperature: float, seed: int) -> np.ndarray:
  """Drawn with softmax(score / temperature): [E] -> [num_new] int, sorted.

  The scores are taken as multiples of their mean, our reading.
  """
  relative = score / max(np.mean(score), 1e-300) / temperature
  chance = np.exp(relative - relative.max())
  return np.sort(np.random.default_rng(seed).choice(len(score), num_new, p=chance / chance.sum()))


def select(
    specs: Tree, factor: int, *, score: Mapping[str, np.ndarray] | None = None,
    allocation: str = 'greedy', cap: int = 3, temperature: float = 1.0, groups: int = 1,
    seed: int = 0,
) -> dict[str, np.ndarray]:
  """The source of every expert of the grown model, {layer: [m E] int32}; the originals come first.

  With groups of experts the copies lie in their source's group, behind its originals; so each group
  gets as many.

  Args:
    score: of `scores`; None: uniform.
    allocation: greedy or weighted.
    cap: greedy: most copies of one expert; 1 is uniform.
    temperature: weighted: small picks the best only.
    groups: nn.config.MoE.groups.
  """
  if factor < 1:
    raise ValueError(f'factor is {factor}, wanted a whole number of at least 1')
  if allocation not in ('greedy', 'weighted'):
    raise ValueError(f'allocation is {allocation!r}, wanted greedy or weighted')
  if cap < 1 or temperature <= 0:
    raise ValueError(f'cap {cap} must be at least 1 and temperature {temperature} above 0')
  found = layers(specs)
  if not found:
    raise ValueError(
        'the model has no experts to copy; a dense one is made a mixture by `from_dense`')

  def group(one, size, number, name):
    new = (factor - 1) * size
    if one is None:
      sel = uniform(size, new)
    elif allocation == 'greedy':
      sel = greedy(one, new, cap)
    else:
      sel = weighted(one, new, temperature, [seed, zlib.crc32(name.encode()), number])
    return np.concatenate([np.arange(size), sel])

  index = {}
  for name, (*lead, num_experts) in found.items():
    size, rows = num_experts // groups, []
    for r in range(math.prod(lead)):
      one = None if score is None else score[name].reshape(-1, num_experts)[r]
      rows.append(np.concatenate([
          g * size + group(
              None if one is None else one[g * size:(g + 1) * size], size, r * groups + g, name)
          for g in range(groups)]))
    index[name] = np.array(rows, np.int32).reshape(*lead, factor * num_experts)
  return index


def is_copy(index: np.ndarray) -> np.ndarray:
  """Which experts of the grown model are copies, all but the first of a source: [..., m E] bool."""
  first = lambda row: np.isin(
      np.arange(len(row)), np.unique(row, return_index=True)[1], invert=True)
  return np.apply_along_axis(first, -1, index)


# ---- The operator

def grown(cfg: MoE, factor: int) -> MoE:
  """The settings with m times the experts; the experts of a token stay as many."""
  return dataclasses.replace(cfg, experts=cfg.experts * factor)


def grow(tree: Tree, specs: Tree, index: Mapping[str, np.ndarray]) -> Tree:
  """Every array with experts by the index, the others as they are.

  Exact: copies are bit-identical to their sources. With softmax scores a selection bias stays as
  large while an expert's score is divided among its copies, so it weighs m times as much in the
  choice until it has adapted; with sigmoid scores nothing changes.

  Args:
    tree: parameters, averages or moments of them, or the trainable part of either.
    specs: the table before growth.
  """
  table = param.flat(specs)
  return param.unflat({
      name: take(a, table[name], index[layer_of(name)]) if 'expert' in table[name].axes else a
      for name, a in param.flat(tree).items()})


def take(a: jax.Array, spec: Spec, index: np.ndarray) -> jax.Array:
  """Expert index[i] of a as its expert i."""
  if 'layers' not in spec.axes:
    return jnp.take(a, index, axis=spec.axes.index('expert'))
  axis = spec.axes[1:].index('expert')                 # layers come first
  return jax.vmap(lambda one, i: jnp.take(one, i, axis=axis))(a, jnp.asarray(index))


def renew(params: Tree, specs: Tree, index: Mapping[str, np.ndarray], seed: int) -> Tree:
  """The grown parameters with every copy replaced by an expert as at the start of a run: a control.

  Args:
    params, specs: after growth.
  """
  table, leaves = param.flat(specs), param.flat(params)
  mine = {name: spec for name, spec in table.items() if 'expert' in spec.axes}
  fresh = param.flat(param.init(jax.random.key(seed), param.unflat(mine)))
  for name, spec in mine.items():
    shape = [n if axis in ('layers', 'expert') else 1 for n, axis in zip(spec.shape, spec.axes)]
    copies = jnp.asarray(is_copy(index[layer_of(name)])).reshape(shape)
    leaves[name] = jnp.where(copies, fresh[name], leaves[name])
  return param.unflat(leaves)


def perturb(
    params: Tree, specs: Tree, index: Mapping[str, np.ndarray], *, noise: float = 1e-3,
    router_noise: float = 0.01, seed: int = 0,
) -> Tree:
  """The grown parameters with copies told apart from their sources, which stay untouched.

  On the selection bias where there is one, by N(0, noise^2): absolute, since noise in proportion to
  the spread of the biases is nothing when they are equal. Otherwise on the router's rows, by
  router_noise times their root mean square, a fallback of ours. Without either, a token's two best
  are always one expert's copies, and these never part.

  Args:
    params, specs: after growth.
  """
  table, leaves = param.flat(specs), param.flat(params)
  for layer, sources in index.items():
    name = next(n for n in (f'{layer}/bias', f'{layer}/router') if n in leaves)
    spec, a = table[name], leaves[name]
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    size = noise if name.endswith('bias') else router_noise * jnp.sqrt(jnp.mean(jnp.square(a)))
    shape = [n if axis in ('layers', 'expert') else 1 for n, axis in zip(a.shape, spec.axes)]
    copies = jnp.asarray(is_copy(sources)).reshape(shape)
    leaves[name] = jnp.where(copies, a + size * jax.random.normal(key, a.shape, a.dtype), a)
  return param.unflat(leaves)


def grow_moments(
    moments: Tree, specs: Tree, index: Mapping[str, np.ndarray], how: str, before: Tree,
    after: Tree,
) -> Tree:
  """Adam's mean or mean square, grown.

  Args:
    how: copy; reset, copies begin at 0; scale, theirs are times 0.5 clip(1 - |dW| / |W|, 0.1, 1),
      per expert and array. The count of Adam's steps is one for all arrays and stays, our reading.
    before, after: the parameters before growth, and grown and perturbed.
  """
  if how not in OPTIMIZERS:
    raise ValueError(f'optimizer is {how!r}, wanted one of {", ".join(OPTIMIZERS)}')
  table, old, new = param.flat(specs), param.flat(before), param.flat(after)
  out = param.flat(grow(moments, specs, index))
  for name in out if how != 'copy' else ():
    spec = table[name]
    if 'expert' not in spec.axes:
      continue
    others = tuple(i for i, axis in enumerate(spec.axes) if axis not in ('layers', 'expert'))
    shape = [n if i not in others else 1 for i, n in enumerate(out[name].shape)]
    share = 0.0
    if how == 'scale':
      norm = lambda a: jnp.sqrt(jnp.sum(jnp.square(a), axis=others, keepdims=True))
      source = take(old[name], spec, index[layer_of(name)])
      share = 0.5 * jnp.clip(
          1 - norm(new[name] - source) / jnp.maximum(norm(source), 1e-30), 0.1, 1)
    out[name] = out[name] * jnp.where(is_copy(index[layer_of(name)]).reshape(shape), share, 1)
  return param.unflat(out)


def grow_load(load: jax.Array, index: np.ndarray) -> jax.Array:
  """A load counter [..., E], grown: originals keep their counts, copies begin at 0."""
  return jnp.where(
      is_copy(index), 0, jnp.take_along_axis(jnp.asarray(load), jnp.asarray(index), axis=-1))


def similarity(params: Tree, specs: Tree, index: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """How far copies have moved apart: every expert's cosine with its original, {layer: [m E]}.

  Args:
    params, specs: after growth, perhaps long after.
  """
  table, leaves = param.flat(specs), param.flat(params)
  found = {}
  for name, spec in table.items():
    layer = layer_of(name)
    if layer not in index or not spec.contract or 'expert' not in spec.axes:
      continue
    original = original_of(index[layer])
    a, b = leaves[name], take(leaves[name], spec, original)
    others = tuple(i for i, axis in enumerate(spec.axes) if axis not in ('layers', 'expert'))
    sums = np.array([dots(x, y, others) for x, y in ((a, b), (a, a), (b, b))], np.float64)
    found[layer] = found.get(layer, 0) + sums
  return {layer: d[0] / np.sqrt(d[1] * d[2]) for layer, d in found.items()}


def original_of(index: np.ndarray) -> np.ndarray:
  """Where the original of every expert is in the grown model: [..., m E] int."""
  first = lambda row: np.unique(row, return_index=True)[1][np.unique(row, return_inverse=True)[1]]
  return np.apply_along_axis(first, -1, index)


# ---- Dense to mixture

def from_dense(
    params: Tree, dense_specs: Tree, specs: Tree, cfg: MoE, key: jax.Array, slices: int = 1,
) -> Tree:
  """A mixture that computes what the dense model does.

  Its experts are copies of the dense FFN, its routers are new.

  Granular (slices > 1): an expert is a slice of the dense inner width. The slices of one copy lie
  side by side and begin with one router column (virtual groups, arXiv:2410.07524), so that a
  token's choice is whole copies; the gates are then times the number of slices.

  Args:
    params, dense_specs: of the dense model.
    specs, cfg: of the mixture; its other arrays are those of the dense model.
    key: for the routers.
  """
  if not cfg.renormalise or cfg.scale != slices:
    raise ValueError(
        f'model.moe: renormalise is {cfg.renormalise} and scale {cfg.scale}; the dense function is '
        f'kept only with gates that sum to 1, times {slices} slices: renormalise=True, '
        f'scale={slices}')
  if cfg.experts % slices or cfg.top_k % slices:
    raise ValueError(f'model.moe: {cfg.experts} experts and top_k {cfg.top_k} must both be '
                     f'multiples of {slices} slices')
  if cfg.shared_dim or cfg.groups != 1:
    raise ValueError(f'model.moe: shared_dim {cfg.shared_dim} and groups {cfg.groups}; a mixture '
                     'made of a dense model has no shared expert and one group')
  old, table, out = param.flat(dense_specs), param.flat(specs), {}
  small = param.unflat({
      name: s for name, s in table.items() if 'expert' in s.axes and not s.contract})
  leaves, fresh = param.flat(params), param.flat(param.init(key, small))     # routers and biases
  for name, spec in table.items():
    if 'expert' not in spec.axes:
      a = leaves.get(name)
    elif name in fresh:
      axis = spec.axes.index('expert')
      a = jnp.repeat(
          jnp.take(fresh[name], jnp.arange(0, cfg.experts, slices), axis=axis), slices, axis=axis)
    else:
      a = leaves[name] if name in leaves and 'expert' not in old[name].axes else None
      a = a if a is None else sliced(a, spec, cfg.experts, slices)
    if a is None or a.shape != spec.shape:
      raise ValueError(
          f'{name} is {spec.shape} in the mixture and {getattr(a, "shape", "absent")} as the dense '
          f'model gives it in {slices} slices; all but the FFNs must be alike, and the dense model '
          'dense')
    out[name] = a
  return param.unflat(out)


def sliced(a: jax.Array, spec: Spec, num_experts: int, slices: int) -> jax.Array:
  """A dense matrix as the experts' array of this spec: slices of the inner width, over and over."""
  axes = tuple(axis for axis in spec.axes if axis != 'expert')
  pieces = jnp.stack(jnp.split(a, slices, axis=axes.index('ffw')), axis=spec.axes.index('expert'))
  return jnp.take(pieces, jnp.arange(num_experts) % slices, axis=spec.axes.index('expert'))
