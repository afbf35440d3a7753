"""Rotary position embedding (arXiv:2104.09864), pairing element i of a head with element i + R/2.

K head size, R elements of it that are turned.
"""

import math

import jax
import jax.numpy as jnp

from nn.config import Rope

UNSCALED = Rope()


def rotate(
    x: jax.Array, positions: jax.Array, theta: float, scaling: Rope = UNSCALED, share: float = 1.0,
) -> jax.Array:
  """Turns pair i of every head by positions * theta**(-2i/R) radians.

  Args:
    x: [..., H, K], any float dtype.
    positions: [...] int32.
    scaling: what becomes of the angles in a longer context.
    share: R / K; the elements after the first R stay.

  Returns:
    [..., H, K] in x's dtype: turned in float32, because bfloat16 cannot hold the angle of a late
    position.
  """
  half = int(x.shape[-1] * share) // 2
  rates = scale_rates(theta ** (-jnp.arange(half, dtype=jnp.float32) / half), theta, scaling)
  angle = positions[..., None, None] * rates
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  if (gain := scaling.attention_gain) != 1:
    cos, sin = cos * gain, sin * gain
  first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def scale_rates(rates: jax.Array, theta: float, scaling: Rope) -> jax.Array:
  """Radians per position of every pair in a longer context: [R/2] float32 -> [R/2].

  linear divides all by the factor (arXiv:2306.15595). The other two divide only those that turn
  seldom within the shorter context; llama3 passes over by the number of turns (arXiv:2407.21783),
  yarn by the index of the pair (arXiv:2309.00071).
  """
  if scaling.kind == '':
    return rates
  if scaling.kind == 'linear':
    return rates / scaling.factor
  if scaling.kind == 'llama3':
    turns = scaling.length * rates / (2 * math.pi)
    kept = (turns - scaling.slow) / (scaling.turns - scaling.slow)
  else:
    half = len(rates)
    pair = lambda turns: (
        half * math.log(scaling.length / (2 * math.pi * turns)) / math.log(theta))
    first, last = pair(scaling.turns), pair(scaling.slow)
    if scaling.truncate:
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    kept = 1 - (jnp.arange(half) - first) / max(last - first, 0.001)
  kept = jnp.clip(kept, 0, 1)
  return rates * kept + rates / scaling.factor * (1 - kept)
