"""A layer: x + mixer(norm(x)), then x + ffn(norm(x)). B rows, T positions, D model width.

With model.post_norms what mixer and FFN return is normalised, too.

A mixer is a module with specs, apply, init_cache, prefill, step and flops, see `nn/attention.py`;
an FFN is a module with specs, apply and flops, see `nn/mlp.py`; one that chooses also takes routes,
see `moe/layer.py`. A new one is one file and one entry here.
"""

import jax
import jax.numpy as jnp

from moe import layer as moe
from nn import attention, cache, gdn, local, mla, mlp, norm, param
from nn.config import ModelConfig

MIXERS = {'attention': attention, 'local': local, 'mla': mla, 'gdn': gdn}
FFNS = {'mlp': mlp, 'moe': moe}

Names = tuple[str, str]                # of the mixer and of the FFN


def specs(cfg: ModelConfig, names: Names) -> dict:
  mixer, ffn = names
  for kind, name, known in (('mixer', mixer, MIXERS), ('FFN', ffn, FFNS)):
    if name not in known:
      raise ValueError(f'unknown {kind} {name!r}; known are {sorted(known)}')
  width = norm.specs(cfg, cfg.embed_dim, 'embed')
  table = {'mixer_norm': width, 'mixer': MIXERS[mixer].specs(cfg),
           'ffn_norm': width, 'ffn': FFNS[ffn].specs(cfg)}
  return table | ({'mixer_post_norm': width, 'ffn_post_norm': width} if cfg.post_norms else {})


def apply(
    params: dict, cfg: ModelConfig, names: Names, x: jax.Array, positions: jax.Array,
    segments: jax.Array, routes: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
  """[B, T, D] -> [B, T, D], and what the FFN reports.

  Args:
    routes: the choice it is to repeat, see `moe/layer.py`.
  """
  y = MIXERS[names[0]].apply(
      params['mixer'], cfg, norm.apply(params['mixer_norm'], cfg, x), positions, segments)
  return _feed_forward(params, cfg, names, x + _after(params, 'mixer', cfg, y), segments, routes)


def init_cache(cfg: ModelConfig, names: Names, num_rows: int, length: int) -> dict:
  """The mixer's state before any token: arrays [B, ...]."""
  return MIXERS[names[0]].init_cache(cfg, num_rows, length)


def prefill(
    params: dict, cfg: ModelConfig, names: Names, x: jax.Array, positions: jax.Array,
    segments: jax.Array, state: dict, at: cache.Place,
) -> tuple[jax.Array, dict]:
  """[B, T, D] -> [B, T, D], and the mixer's state after these positions. at: see `nn/cache.py`."""
  y, state = MIXERS[names[0]].prefill(
      params['mixer'], cfg, norm.apply(params['mixer_norm'], cfg, x), positions, segments, state,
      at)
  x = x + _after(params, 'mixer', cfg, y)
  return _feed_forward(params, cfg, names, x, segments)[0], state


def step(
    params: dict, cfg: ModelConfig, names: Names, x: jax.Array, position: jax.Array,
    valid: jax.Array, index: jax.Array, state: dict, at: cache.Place,
) -> tuple[jax.Array, dict]:
  """[B, D] -> [B, D], and the mixer's next state."""
  y, state = MIXERS[names[0]].step(
      params['mixer'], cfg, norm.apply(params['mixer_norm'], cfg, x), position, valid, index, state,
      at)
  x = (x + _after(params, 'mixer', cfg, y))[:, None]
  return _feed_forward(params, cfg, names, x, jnp.ones(x.shape[:2], jnp.int32))[0][:, 0], state


def flops(cfg: ModelConfig, names: Names, length: int) -> int:
  """Floating point operations of the forward pass, per token."""
  return MIXERS[names[0]].flops(cfg, length) + FFNS[names[1]].flops(cfg, length)


def _after(params: dict, which: str, cfg: ModelConfig, y: jax.Array) -> jax.Array:
  return norm.apply(params[f'{which}_post_norm'], cfg, y) if cfg.post_norms else y


def _feed_forward(
    params: dict, cfg: ModelConfig, names: Names, x: jax.Array, segments: jax.Array,
    routes: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
  replay = () if routes is None else (routes,)
  y, extras = FFNS[names[1]].apply(
      params['ffn'], cfg, norm.apply(params['ffn_norm'], cfg, x), segments, *replay)
  x = x + _after(params, 'ffn', cfg, y)
  return param.constrain(x, cfg.rules, 'batch', 'time', None), extras
