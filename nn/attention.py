"""The attention mixer: grouped-query heads, rotary positions, optional q/k norm, biases and output
gate, and a KV cache.

B rows, T positions, L cache slots, D model width, H query heads, G key/value heads, K head size.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import attention as kernel
from nn import cache, norm, param, rope
from nn.config import ModelConfig, Rope
from nn.linear import linear
from nn.param import Spec

# k [B, G, K, L] and v [B, G, L, K] in the compute dtype: as the two products of a step read them.
State = dict[str, jax.Array]


class Reach(NamedTuple):
  """What the mixers 'attention' and 'local' differ in."""
  window: int                          # tokens that are seen, the token itself included; 0: all
  theta: float                         # base of the rotary angles; 0: no positions
  rope: Rope


def everything(cfg: ModelConfig) -> Reach:
  return Reach(0, cfg.rope_theta, cfg.rope)


def specs(cfg: ModelConfig) -> dict:
  sizes = {'embed': cfg.embed_dim, 'heads': cfg.num_heads, 'kv_heads': cfg.num_kv_heads,
           'head_dim': cfg.head_dim}
  table = {
      'q': param.matrix(sizes, ('embed', 'heads', 'head_dim'), contract=('embed',)),
      'k': param.matrix(sizes, ('embed', 'kv_heads', 'head_dim'), contract=('embed',)),
      'v': param.matrix(sizes, ('embed', 'kv_heads', 'head_dim'), contract=('embed',)),
      'o': param.matrix(sizes, ('heads', 'head_dim', 'embed'), contract=('heads', 'head_dim'),
                        scale=(2 * len(cfg.layers)) ** -0.5),
  }
  if cfg.attention_gate:
    table['gate'] = param.matrix(sizes, ('embed', 'heads', 'head_dim'), contract=('embed',))
  for name in cfg.attention_bias:
    s = table[name]
    outputs = [(n, axis) for n, axis in zip(s.shape, s.axes) if axis not in s.contract]
    table[f'{name}_bias'] = Spec(*zip(*outputs), param.zeros)
  if cfg.qk_norm:
    table |= {name: norm.specs(cfg, cfg.head_dim, 'head_dim') for name in ('q_norm', 'k_norm')}
  return table


def apply(
    params: dict, cfg: ModelConfig, x: jax.Array, positions: jax.Array, segments: jax.Array,
    reach: Callable[[ModelConfig], Reach] = everything,
) -> jax.Array:
  """Attention over a whole row: [B, T, D], [B, T], [B, T] -> [B, T, D]."""
  q, k, v = project(params, cfg, x, positions, reach(cfg))
  return output(params, cfg, x, _attend(cfg, q, k, v, segments, reach(cfg).window))


def init_cache(cfg: ModelConfig, num_rows: int, length: int) -> State:
  def zeros(*sizes):
    empty = jnp.zeros((num_rows, cfg.num_kv_heads, *sizes), cfg.dtype)
    return param.constrain(empty, cfg.rules, 'batch', 'kv_heads', None, None)

  return {'k': zeros(cfg.head_dim, length), 'v': zeros(length, cfg.head_dim)}


def prefill(
    params: dict, cfg: ModelConfig, x: jax.Array, positions: jax.Array, segments: jax.Array,
    state: State, at: cache.Place, reach: Callable[[ModelConfig], Reach] = everything,
) -> tuple[jax.Array, State]:
  """`apply`, and the keys and values of the T positions in the first T slots of the cache."""
  q, k, v = project(params, cfg, x, positions, reach(cfg))
  heads = _attend(cfg, q, k, v, segments, reach(cfg).window)
  return output(params, cfg, x, heads), _write(state, k, v, at, 0)


def step(
    params: dict, cfg: ModelConfig, x: jax.Array, position: jax.Array, valid: jax.Array,
    index: jax.Array, state: State, at: cache.Place,
    reach: Callable[[ModelConfig], Reach] = everything,
) -> tuple[jax.Array, State]:
  """One token of every row.

  Args:
    x: [B, D].
    position: [B] int32, of the token in its row.
    valid: [B, L] bool, slots to attend to, the one at index included.
    index: [] int32, the slot this token goes to.
  """
  q, k, v = project(params, cfg, x, position, reach(cfg))
  state = _write(state, k[:, None], v[:, None], at, index)
  if window := reach(cfg).window:
    valid = valid & (jnp.arange(valid.shape[1]) > index - window)
  heads = kernel.decode_attention(
      q, cache.read(state['k'], at), cache.read(state['v'], at), valid, _scale(cfg))
  return output(params, cfg, x, heads), state


def _scale(cfg: ModelConfig) -> float:
  return (cfg.query_scalar or cfg.head_dim) ** -0.5


def _attend(
    cfg: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: int,
) -> jax.Array:
  split = functools.partial(param.mesh_axes, cfg.rules)
  axes = kernel.Axes(
      split('batch', q.shape[0]), split('heads', q.shape[2]), split('kv_heads', k.shape[2]))
  return kernel.attention(
      q, k, v, segments=segments, scale=_scale(cfg), window=window, implementation=cfg.attention,
      axes=axes)


def _write(
    state: State, k: jax.Array, v: jax.Array, at: cache.Place, index: int | jax.Array,
) -> State:
  """Puts k and v [B, T, G, K] into T slots from `index`."""
  return {'k': cache.write(state['k'], k.transpose(0, 2, 3, 1), (0, 0, 0, index), at),
          'v': cache.write(state['v'], v.swapaxes(1, 2), (0, 0, index, 0), at)}


def flops(
    cfg: ModelConfig, length: int, reach: Callable[[ModelConfig], Reach] = everything,
) -> int:
  """FLOPs of the forward pass, per token of a row of `length`: half of it is ahead, and skipped."""
  heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
  window = reach(cfg).window
  seen = min(2 * window, length) if window else length
  matrices = (3 if cfg.attention_gate else 2) * heads + 2 * kv_heads
  return 2 * cfg.embed_dim * matrices + 2 * heads * seen


def project(
    params: dict, cfg: ModelConfig, x: jax.Array, positions: jax.Array, reach: Reach,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """q [..., H, K], k and v [..., G, K] of x [..., D], normalised and turned to positions [...]."""
  q, k, v = (_biased(params, name, linear(x, params[name])) for name in ('q', 'k', 'v'))
  if cfg.qk_norm:
    q, k = norm.apply(params['q_norm'], cfg, q), norm.apply(params['k_norm'], cfg, k)
  if reach.theta:
    q, k = (rope.rotate(a, positions, reach.theta, reach.rope, cfg.rope_share) for a in (q, k))
  lead = (None,) * (x.ndim - 2)
  q = param.constrain(q, cfg.rules, 'batch', *lead, 'heads', None)
  k = param.constrain(k, cfg.rules, 'batch', *lead, 'kv_heads', None)
  return q, k, param.constrain(v, cfg.rules, 'batch', *lead, 'kv_heads', None)


def output(params: dict, cfg: ModelConfig, x: jax.Array, heads: jax.Array) -> jax.Array:
  """[..., H, K] -> [..., D], gated by x [..., D] first where the model says so."""
  if cfg.attention_gate:
    heads = heads * jax.nn.sigmoid(_biased(params, 'gate', linear(x, params['gate'])))
  return _biased(params, 'o', linear(heads, params['o'], 2))


def _biased(params: dict, name: str, y: jax.Array) -> jax.Array:
  bias = params.get(f'{name}_bias')
  return y if bias is None else y + bias.astype(y.dtype)
