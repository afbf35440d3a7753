"""Normalisation. D is the size of the normalised axis: model width, or head size for q and k."""

import jax
import jax.numpy as jnp

from nn import param
from nn.config import ModelConfig
from nn.param import Spec


def specs(cfg: ModelConfig, size: int, axis: str) -> dict[str, Spec]:
  return {'scale': Spec((size,), (axis,), param.zeros if cfg.unit_offset else param.ones)}


def apply(params: dict, cfg: ModelConfig, x: jax.Array) -> jax.Array:
  """`rms_norm` with the model's settings: [..., D] -> [..., D]."""
  scale = params['scale'].astype(jnp.float32)
  return rms_norm(x, 1 + scale if cfg.unit_offset else scale, cfg.norm_eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Scales every vector of x to unit root mean square, then by a learned gain.

  Args:
    x: [..., D], any float dtype.
    scale: [D].
    eps: added to the mean square, so that a zero vector stays zero.

  Returns:
    [..., D], in x's dtype: computed in float32 and rounded once, at the end.
  """
  x32 = x.astype(jnp.float32)
  inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * inverse_rms * scale.astype(jnp.float32)).astype(x.dtype)
