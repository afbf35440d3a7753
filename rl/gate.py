"""Dynamic gradient gating (DGG, arXiv:2605.19425): a gate that ends the reuse of a rollout batch.

When reuse goes wrong, the gradient of the output head grows first, and much more than any other.
The gate watches the increments of its norm: one far above what the last ones were, on a second or
later use of a batch, is refused. The optimiser then does nothing at all, and the loop samples anew.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

EPS = 1e-8


class GateState(NamedTuple):
  """What the gate remembers; in the optimiser's state, so that it is saved and resumed with it."""
  inner: Any                           # of the optimiser behind the gate
  last: jax.Array                      # [] float32, energy observed before; -1: none yet
  increments: jax.Array                # [window] float32, the last ones, in a ring
  count: jax.Array                     # [] int32, increments observed
  z: jax.Array                         # [] float32, how far the last one was out; 0: not known
  refused: jax.Array                   # [] bool, whether the last gradient was


def gate(
    inner: optax.GradientTransformation, threshold: float, window: int = 32, squared: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """The optimiser behind a gate.

  z = (increment - mean) / (deviation + 1e-8), over the last `window` increments, is compared with
  the threshold, on uses after the first and once the window is full. Every finite increment enters
  the window, a refused one too; the energy is that of the gradient before it is clipped (our
  readings). An energy that is not finite is refused and not remembered.

  `update` takes head_norm [] (norm of the head's gradient, over all devices) and use [] (which use
  of these rows this is, from 0) by name. A refused gradient gives updates of 0 and leaves the inner
  state as it was; `refused` says so.

  Args:
    threshold: largest z that passes; infinity: everything finite does.
    window: increments that are remembered.
    squared: the energy is the square of the norm (our reading is the norm).
  """
  if window < 2:
    raise ValueError(f'rl.gate.window is {window}, wanted at least 2 increments')
  inner = optax.with_extra_args_support(inner)

  def init(params):
    zero = jnp.float32(0)
    return GateState(inner.init(params), jnp.float32(-1), jnp.zeros(window), jnp.int32(0),
                     zero, jnp.array(False))

  def update(updates, state, params=None, *, head_norm, use, **others):
    energy = jnp.float32(head_norm) ** (2 if squared else 1)
    increment = energy - state.last
    known = jnp.isfinite(energy) & (state.last >= 0)
    full = state.count >= window
    z = (increment - jnp.mean(state.increments)) / (jnp.std(state.increments) + EPS)
    z = jnp.where(known & full, z, 0.0)
    refused = ~jnp.isfinite(energy) | ((use > 0) & known & full & (z > threshold))
    new_updates, new_inner = jax.lax.cond(
        refused, lambda updates, old: (jax.tree.map(jnp.zeros_like, updates), old),
        lambda updates, old: inner.update(updates, old, params, use=use, **others),
        updates, state.inner)
    return new_updates, GateState(
        inner=new_inner,
        last=jnp.where(jnp.isfinite(energy), energy, state.last),
        increments=jnp.where(
            known, state.increments.at[state.count % window].set(increment), state.increments),
        count=state.count + known, z=z, refused=refused)

  return optax.GradientTransformationExtraArgs(init, update)


def refused(opt_state: Any) -> jax.Array:
  """Whether the gate refused the last gradient, [] bool; False without a gate."""
  return opt_state.refused if isinstance(opt_state, GateState) else jnp.array(False)
