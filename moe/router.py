"""Which experts a token goes to, with what weight, and what keeps their loads even.

N tokens, D model width, E experts, K experts of a token. Everything here is in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FAR = -1e30                            # a score that is never chosen


class Choice(NamedTuple):
  """The router's decision."""
  experts: jax.Array                   # [N, K] int32, those taken
  own: jax.Array                       # [N, K] int32, its own choice, best first; replay overrides
  gates: jax.Array                     # [N, K] float32, weights of their outputs
  shares: jax.Array                    # [N, E] float32, scores that sum to 1, for the balance loss
  normaliser: jax.Array                # [N] float32, log of the sum of exp(logits)


def route(
    logits: jax.Array, bias: jax.Array | None, cfg, replay: jax.Array | None = None,
) -> Choice:
  """The experts of every token.

  Args:
    logits: [N, E] float32.
    bias: [E] float32, added to the scores in the choice and nowhere else (arXiv:2408.15664); None:
      there is none.
    cfg: nn.config.MoE.
    replay: [N, K] integers, experts to take instead of choosing, -1 where there is nothing to
      replay; gates and their gradients are those of today's scores.
  """
  normaliser = jax.nn.logsumexp(logits, axis=-1)
  if cfg.scores == 'softmax':
    scores = shares = jnp.exp(logits - normaliser[:, None])
  else:
    scores = jax.nn.sigmoid(logits)
    shares = scores / jnp.sum(scores, axis=-1, keepdims=True)
  experts = own = choose(scores if bias is None else scores + bias, cfg)
  if replay is not None:
    experts = jnp.where(replay >= 0, replay, own)
  gates = jnp.take_along_axis(scores, experts, axis=-1)
  if cfg.renormalise:
    gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)   # sigmoids may all be 0
  return Choice(experts, own, gates * cfg.scale, shares, normaliser)


def choose(scores: jax.Array, cfg) -> jax.Array:
  """The K highest: [N, E] -> [N, K] int32. At a tie the lower index is first.

  With groups only those in the best groups count, and a group is worth its two best experts
  together (arXiv:2412.19437, section 2.1.2). Scores may be negative with a bias; the groups that
  are left out are never chosen all the same, our reading.
  """
  scores = jax.lax.stop_gradient(scores)
  if cfg.top_groups < cfg.groups:
    by_group = scores.reshape(len(scores), cfg.groups, -1)
    worth = jnp.sum(jax.lax.top_k(by_group, min(2, by_group.shape[-1]))[0], axis=-1)
    best = jax.lax.top_k(worth, cfg.top_groups)[1]
    kept = jnp.any(best[:, :, None] == jnp.arange(cfg.groups), axis=1)
    scores = jnp.where(kept[:, :, None], by_group, FAR).reshape(scores.shape)
  return jax.lax.top_k(scores, cfg.top_k)[1]


def statistics(choice: Choice, real: jax.Array) -> dict[str, jax.Array]:
  """Sums over tokens, which add up over devices: all that the losses and the loads need.

  Args:
    real: [N] bool, false at padding, which counts nowhere.
  """
  num_experts = choice.shares.shape[-1]
  mine = jnp.where(real[:, None], choice.experts, num_experts)
  return {
      'load': jnp.sum(
          mine.reshape(-1, 1) == jnp.arange(num_experts), axis=0, dtype=jnp.int32),    # [E] tokens
      'shares': jnp.sum(jnp.where(real[:, None], choice.shares, 0), axis=0),           # [E]
      'squares': jnp.sum(jnp.where(real, jnp.square(choice.normaliser), 0)),           # []
      'tokens': jnp.sum(real, dtype=jnp.int32),                                        # []
  }


def losses(stats: dict[str, jax.Array], cfg) -> dict[str, jax.Array]:
  """{name: [] float32}, times their coefficients; those with coefficient 0 are left out.

  balance: E sum_e f_e P_e, f_e the share of the choices that fell on expert e and P_e its mean
    share of the scores (arXiv:2101.03961, eq. 4 to 6, over K choices): 1 for even loads, E if one
    expert gets all.
  router_z: the mean square of the log-normaliser (arXiv:2202.08906, eq. 5).
  """
  tokens = jnp.maximum(stats['tokens'], 1).astype(jnp.float32)
  out = {}
  if cfg.balance_loss:
    chosen = stats['load'].astype(jnp.float32) / (tokens * cfg.top_k)
    out['balance'] = cfg.balance_loss * cfg.experts * jnp.sum(chosen * stats['shares'] / tokens)
  if cfg.z_loss:
    out['router_z'] = cfg.z_loss * stats['squares'] / tokens
  return out


def update_bias(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
  """The selection bias after an optimiser step (arXiv:2408.15664, alg. 1).

  It goes down where the load was above its mean, and up below.

  Args:
    bias: [..., E] float32.
    load: [..., E], tokens each expert got in the step, over all microbatches and devices.
    rate: how far it moves.
  """
  load = load.astype(jnp.float32)
  return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def differ(a: jax.Array, b: jax.Array) -> jax.Array:
  """Whether two choices are of different experts, in any order: [..., K] twice -> [...] bool."""
  return jnp.any(jnp.all(a[..., :, None] != b[..., None, :], axis=-1), axis=-1)


def load_metrics(load: jax.Array) -> dict[str, jax.Array]:
  """How uneven the loads of a layer are: [..., E] -> {name: [...] float32}.

  violation: the largest load over the mean, minus 1 (MaxVio of arXiv:2408.15664); 0 for even loads.
  idle: share of the experts that no token went to.
  """
  load = load.astype(jnp.float32)
  mean = jnp.maximum(jnp.mean(load, axis=-1), 1e-20)
  return {'violation': jnp.max(load, axis=-1) / mean - 1, 'idle': jnp.mean(load == 0, axis=-1)}
