"""Padding and new segments as inputs that the kernels need not know of.

The letters of reference.py.
"""

import jax.numpy as jnp

FORGET = -1e4  # exp of any sum of log-decays with this one in it is 0


def mask(q, k, v, g, valid, fresh):
  """q, k, v, g with which a token that is not valid does nothing and a fresh one forgets the state.

  valid and fresh [B, T] may be None: then there is nothing to mask.
  """
  if valid is None:
    return q, k, v, g
  valid, fresh = valid[..., None, None], fresh[..., None, None]
  q, k, v = (jnp.where(valid, x, 0) for x in (q, k, v))
  return q, k, v, jnp.where(fresh, FORGET, jnp.where(valid, g, 0))
