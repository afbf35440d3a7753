"""The definition of causal attention over packed rows.

B rows, T positions, H query heads, G key/value heads, K head size, V size of a value (often K).
"""

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segments: jax.Array, scale: float,
    window: int = 0,
) -> jax.Array:
  """out[t, h] = sum_s p[s] v[s, g], p = softmax_s(scale q[t, h] . k[s, g]), g = h // (H / G).

  Both are over s <= t of t's segment; with a window only over its last positions, t - s < window.

  Args:
    q: [B, T, H, K].
    k: [B, T, G, K].
    v: [B, T, G, V].
    segments: [B, T] int32; a padding position (0) gives zeros.

  Returns:
    [B, T, H, V] in q's dtype; scores and softmax in float32.
  """
  num_groups = k.shape[2]
  time = jnp.arange(q.shape[1])
  seen = ((time[:, None] >= time) & (segments[:, :, None] == segments[:, None, :])
          & (segments != 0)[:, :, None])
  if window:
    seen &= time[:, None] - time < window
  q = q.reshape(*q.shape[:2], num_groups, -1, q.shape[3])
  scores = scale * jnp.einsum('btgrk,bsgk->bgrts', q, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(
      jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1, where=seen[:, None, None])
  out = jnp.einsum('bgrts,bsgv->btgrv', weights, v.astype(jnp.float32))
  return out.reshape(*out.shape[:2], -1, out.shape[4]).astype(q.dtype)
