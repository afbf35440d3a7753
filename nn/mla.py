"""The mixer of multi-head latent attention (arXiv:2405.04434, section 2.1; arXiv:2412.19437).

Keys and values of all heads come from one short latent vector per token, and so do the queries if
`model.mla.q_rank` is set. Every head has N channels without positions and P with; the key of the
latter comes straight from x and is the same for all heads. Without a base (`model.rope_theta` 0)
nothing is turned (Kimi-Linear, arXiv:2510.26692).

The cache holds what a token's keys and values are made of: R + P numbers per token and layer in the
compute dtype, where attention keeps 2 G K. A step never makes keys: it takes queries into the space
of latents, attends there, and takes sums out of it (the absorbed form, the same function).

B rows, T positions, L cache slots, D model width, H heads, R rank of the latent of keys and values,
Q of the queries', N, P and V channels of a head: without positions, with, and of its value.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import attention as kernel
from nn import cache, norm, param, rope
from nn.config import ModelConfig
from nn.linear import linear
from nn.param import Spec

# latent [B, L, R + P] in the compute dtype: c, then the shared key, turned. Heads are split over
# devices, the latent is whole on each of them.
State = dict[str, jax.Array]


def specs(cfg: ModelConfig) -> dict:
  m = cfg.mla_sizes
  sizes = {'embed': cfg.embed_dim, 'heads': cfg.num_heads, 'value_dim': m.value_dim}

  def matrix(axes, contract=('embed',), **other):
    return param.matrix(sizes | other, axes, contract)

  table = {
      'kv_down': matrix(('embed', 'rank'), rank=m.kv_rank),
      'kv_norm': Spec((m.kv_rank,), ('rank',), param.ones),
      'k_up': matrix(('rank', 'heads', 'key_dim'), ('rank',), rank=m.kv_rank, key_dim=m.nope_dim),
      'v_up': matrix(('rank', 'heads', 'value_dim'), ('rank',), rank=m.kv_rank),
      'o': param.matrix(sizes, ('heads', 'value_dim', 'embed'), contract=('heads', 'value_dim'),
                        scale=(2 * len(cfg.layers)) ** -0.5),
  }
  if m.rope_dim:
    table['k_shared'] = matrix(('embed', 'key_dim'), key_dim=m.rope_dim)
  key_dim = m.nope_dim + m.rope_dim
  if not cfg.mla.q_rank:
    return table | {'q': matrix(('embed', 'heads', 'key_dim'), key_dim=key_dim)}
  rank = cfg.mla.q_rank
  return table | {
      'q_down': matrix(('embed', 'rank'), rank=rank),
      'q_norm': Spec((rank,), ('rank',), param.ones),
      'q_up': matrix(('rank', 'heads', 'key_dim'), ('rank',), rank=rank, key_dim=key_dim)}


def apply(
    params: dict, cfg: ModelConfig, x: jax.Array, positions: jax.Array, segments: jax.Array,
) -> jax.Array:
  """Attention over a whole row: [B, T, D], [B, T], [B, T] -> [B, T, D]."""
  return _run(params, cfg, x, positions, segments)[0]


def init_cache(cfg: ModelConfig, num_rows: int, length: int) -> State:
  m = cfg.mla_sizes
  empty = jnp.zeros((num_rows, length, m.kv_rank + m.rope_dim), cfg.dtype)
  return {'latent': param.constrain(empty, cfg.rules, 'batch', None, None)}


def prefill(
    params: dict, cfg: ModelConfig, x: jax.Array, positions: jax.Array, segments: jax.Array,
    state: State, at: cache.Place,
) -> tuple[jax.Array, State]:
  """`apply`, and the latents of the T positions in the first T slots of the cache."""
  y, latent = _run(params, cfg, x, positions, segments)
  return y, {'latent': cache.write(state['latent'], latent, (0, 0, 0), at)}


def step(
    params: dict, cfg: ModelConfig, x: jax.Array, position: jax.Array, valid: jax.Array,
    index: jax.Array, state: State, at: cache.Place,
) -> tuple[jax.Array, State]:
  """One token of every row, in the absorbed form. Arguments as in `nn/attention.py`."""
  rank = cfg.mla_sizes.kv_rank
  plain, turned = _queries(params, cfg, x, position)
  new = jnp.concatenate(_latent(params, cfg, x, position), axis=-1)
  state = {'latent': cache.write(state['latent'], new[:, None], (0, index, 0), at)}
  absorbed = jnp.einsum('bhn,rhn->bhr', plain, params['k_up'].astype(x.dtype))
  q = param.constrain(
      jnp.concatenate([absorbed, turned], axis=-1), cfg.rules, 'batch', 'heads', None)
  # One array serves as keys and as values of a single group: a slice would be a copy of the cache.
  latent = cache.read(state['latent'], at)[:, None]
  sums = kernel.decode_attention(q, latent.swapaxes(2, 3), latent, valid, _scale(cfg))[..., :rank]
  heads = jnp.einsum('bhr,rhv->bhv', sums, params['v_up'].astype(x.dtype))
  return linear(heads, params['o'], 2), state


def flops(cfg: ModelConfig, length: int) -> int:
  """FLOPs of the forward pass, per token of a row of `length`: half of it is ahead, and skipped."""
  m = cfg.mla_sizes
  channels = m.nope_dim + m.rope_dim + m.value_dim
  return param.matmul_flops(specs(cfg)) + 2 * cfg.num_heads * channels * length // 2


def _run(params, cfg, x, positions, segments):
  """[B, T, D], and what the cache keeps [B, T, R + P]."""
  q = jnp.concatenate(_queries(params, cfg, x, positions), axis=-1)
  latent, shared = _latent(params, cfg, x, positions)
  k = linear(latent, params['k_up'])
  everyone = jnp.broadcast_to(shared[:, :, None], (*k.shape[:3], shared.shape[-1]))
  k, v = jnp.concatenate([k, everyone], axis=-1), linear(latent, params['v_up'])
  q, k, v = (param.constrain(a, cfg.rules, 'batch', None, 'heads', None) for a in (q, k, v))
  split = functools.partial(param.mesh_axes, cfg.rules)
  heads = split('heads', cfg.num_heads)
  out = kernel.attention(
      q, k, v, segments=segments, scale=_scale(cfg), implementation=cfg.attention,
      axes=kernel.Axes(split('batch', q.shape[0]), heads, heads))
  return linear(out, params['o'], 2), jnp.concatenate([latent, shared], axis=-1)


def _queries(params, cfg, x, positions):
  """Channels without positions [..., H, N], and with [..., H, P], turned to positions [...]."""
  if cfg.mla.q_rank:
    low = norm.rms_norm(linear(x, params['q_down']), params['q_norm'], cfg.mla.norm_eps)
    q = linear(low, params['q_up'])
  else:
    q = linear(x, params['q'])
  plain, turned = jnp.split(q, [cfg.mla_sizes.nope_dim], axis=-1)
  return plain, _turn(cfg, turned, positions)


def _latent(params, cfg, x, positions):
  """Normalised latent [..., R] and shared key [..., P], turned to positions [...]."""
  latent = norm.rms_norm(linear(x, params['kv_down']), params['kv_norm'], cfg.mla.norm_eps)
  if not cfg.mla_sizes.rope_dim:
    return latent, latent[..., :0]
  shared = linear(x, params['k_shared'])
  return latent, _turn(cfg, shared[..., None, :], positions)[..., 0, :]


def _turn(cfg, x, positions):
  """x [..., H, P] turned; where pairs are neighbours, they come out as element i and i + P/2."""
  if not (cfg.rope_theta and x.shape[-1]):
    return x
  if cfg.mla.interleaved:
    x = x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)
  return rope.rotate(x, positions, cfg.rope_theta, cfg.rope)


def _scale(cfg):
  """Of the scores."""
  return (cfg.mla_sizes.nope_dim + cfg.mla_sizes.rope_dim) ** -0.5 * cfg.rope.latent_gain**2
