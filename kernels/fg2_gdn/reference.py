"""The delta-rule family token by token: the definition that the fast forms are held to.

B rows, T tokens, Hk key heads, Hv value heads, K key channels, V value channels. Value head h reads
key head h // (Hv // Hk).
"""

import jax
import jax.numpy as jnp


def scan(q, k, v, g, gate_k, gate_v, state, valid, fresh, *, symmetric, scale):
  """Runs the recurrence below over the tokens of every row; plain autodiff goes through it.

  Per value head, with S the state [K, V] and all products of vectors taken channel by channel:

    a_t = gate_k_t k_t  if symmetric, else  k_t            where the state is written
    b_t = gate_k_t k_t                                     where the state is read to erase
    x_t = gate_v_t v_t                                     what is written
    F_t = Diag(exp(g_t)) S_{t-1}                           the decayed state, 0 where t is fresh
    u_t = x_t - F_t^T b_t
    S_t = F_t + a_t u_t^T
    o_t = scale S_t^T q_t

  A token that is not valid leaves the state alone, and its output is 0.

  Args:
    q: [B, T, Hk, K].
    k: [B, T, Hk, K].
    v: [B, T, Hv, V].
    g: [B, T, Hv, K] or [B, T, Hv, 1], log-decay in nats, at most 0.
    gate_k: [B, T, Hv, K] or [B, T, Hv, 1].
    gate_v: [B, T, Hv, V] or [B, T, Hv, 1].
    state: [B, Hv, K, V], before the first token.
    valid: [B, T] bool; False: padding.
    fresh: [B, T] bool; True: the state is forgotten before this token.
    symmetric: whether gate_k scales the key where it writes (FG2-GDN), or only where it erases
      (KDA, GDN-2).
    scale: what the output is multiplied by.

  Returns:
    o [B, T, Hv, V] in v's dtype, and the state after the last token [B, Hv, K, V]; computed in
    state's dtype.
  """

  def token(state, at):
    *arrays, valid, fresh = at
    q, k, v, g, gate_k, gate_v = (x.astype(state.dtype) for x in arrays)
    kept = jnp.where(fresh[:, None, None, None], 0, state)
    o, after = step(q, k, v, g, gate_k, gate_v, kept, symmetric=symmetric, scale=scale)
    valid = valid[:, None, None]
    return jnp.where(valid[..., None], after, state), jnp.where(valid, o, 0).astype(v.dtype)

  over_time = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, gate_k, gate_v, valid, fresh)]
  state, o = jax.lax.scan(token, state, over_time)
  return jnp.moveaxis(o, 0, 1).astype(v.dtype), state


def step(q, k, v, g, gate_k, gate_v, state, *, symmetric, scale):
  """One token of `scan`: its arrays without T, in one dtype -> o [B, Hv, V], state."""
  group = v.shape[1] // k.shape[1]
  q, k = (jnp.repeat(x, group, axis=1) for x in (q, k))
  b = gate_k * k
  a = b if symmetric else k
  decayed = jnp.exp(g)[..., None] * state
  u = gate_v * v - jnp.einsum('bhkv,bhk->bhv', decayed, b, precision='highest')
  state = decayed + a[..., None] * u[..., None, :]
  return scale * jnp.einsum('bhkv,bhk->bhv', state, q, precision='highest'), state
