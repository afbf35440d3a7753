"""The gate on reuse: what it refuses and remembers; a refusal leaves the optimiser alone."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl import gate

PARAMS = {'w': jnp.array([1.0, -2.0])}
GRADS = {'w': jnp.array([0.5, 0.25])}


class ByHand:
  """The rule as the paper states it, one number at a time; use counts from 0."""

  def __init__(self, threshold, window):
    self.threshold, self.last, self.seen = threshold, None, collections.deque(maxlen=window)

  def __call__(self, norm, use):
    if not math.isfinite(norm):
      return True
    refuse = False
    if self.last is not None:
      increment = norm - self.last
      if use > 0 and len(self.seen) == self.seen.maxlen:
        refuse = (increment - np.mean(self.seen)) / (np.std(self.seen) + gate.EPS) > self.threshold
      self.seen.append(increment)
    self.last = norm
    return bool(refuse)


def drive(tx, norms, uses, grads=GRADS):
  """(refused [n], states) over a sequence of norms."""
  def step(state, one):
    _, state = tx.update(grads, state, PARAMS, head_norm=one[0], use=one[1])
    return state, state
  norms = jnp.asarray(norms, jnp.float32)
  return jax.jit(lambda s: jax.lax.scan(
      step, s, (norms, jnp.asarray(uses, jnp.int32))))(tx.init(PARAMS))[1]


@pytest.mark.parametrize('threshold', [-0.5, 0.1, 1.0])
def test_decisions_are_those_of_the_rule(threshold):
  rng = np.random.default_rng(0)
  norms = (5 + np.cumsum(rng.standard_normal(200))).astype(np.float32) + 50
  norms[[40, 90]] = np.nan, np.inf
  uses = rng.integers(0, 4, 200)
  by_hand = ByHand(threshold, 16)
  expected = [by_hand(float(norm), use) for norm, use in zip(norms, uses)]
  states = drive(gate.gate(optax.adam(0.1), threshold, 16), norms, uses)
  np.testing.assert_array_equal(states.refused, expected)
  assert 10 < sum(expected) < 190


def test_first_uses_and_what_comes_before_the_window_is_full_always_pass():
  tx = gate.gate(optax.adam(0.1), -1e9, 8)
  rng = np.random.default_rng(1)
  norms = 10 + rng.random(30)
  assert not drive(tx, norms, np.zeros(30)).refused.any()
  refused = drive(tx, norms, np.ones(30)).refused
  assert not refused[:9].any() and refused[9:].all()     # 8 increments are known from the 9th on


def test_a_falling_norm_is_never_refused_and_infinity_refuses_nothing_finite():
  rng = np.random.default_rng(2)
  norms = np.abs(10 + 0.1 * rng.standard_normal(40))
  norms[-1] = 0.5
  assert not drive(gate.gate(optax.adam(0.1), 0.1, 8), norms, np.ones(40)).refused[-1]
  norms[-1] = 1e6
  assert drive(gate.gate(optax.adam(0.1), 0.1, 8), norms, np.ones(40)).refused[-1]
  assert not drive(gate.gate(optax.adam(0.1), math.inf, 8), norms, np.ones(40)).refused.any()


def test_a_refused_gradient_leaves_the_optimiser_as_it_was_and_gives_no_update():
  tx = gate.gate(optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)), 0.5, 4)
  state = tx.init(PARAMS)
  for norm in (1.0, 1.1, 1.0, 1.1, 1.0, 1.1):
    updates, state = tx.update(GRADS, state, PARAMS, head_norm=norm, use=0)
    assert np.abs(updates['w']).min() > 0
  updates, after = tx.update(GRADS, state, PARAMS, head_norm=100.0, use=2)
  assert after.refused and float(after.last) == 100 and int(after.count) == int(state.count) + 1
  np.testing.assert_array_equal(updates['w'], 0)
  jax.tree.map(np.testing.assert_array_equal, after.inner, state.inner)


@pytest.mark.parametrize('threshold, uses', [(math.inf, [0, 1, 2, 3] * 5), (-1e9, [0] * 20)])
def test_an_open_gate_and_single_use_are_the_optimiser_itself(threshold, uses):
  plain, behind = optax.adam(0.1), gate.gate(optax.adam(0.1), threshold, 4)
  a, b = plain.init(PARAMS), behind.init(PARAMS)
  for use in uses:
    grads = jax.tree.map(lambda g: g * (1 + use), GRADS)
    left, a = plain.update(grads, a, PARAMS)
    right, b = behind.update(grads, b, PARAMS, head_norm=1.0 + use, use=use)
    jax.tree.map(np.testing.assert_array_equal, left, right)
  jax.tree.map(np.testing.assert_array_equal, a, b.inner)


def test_what_is_not_finite_is_refused_and_not_remembered():
  tx = gate.gate(optax.adam(0.1), 0.5, 4)
  states = drive(tx, [1.0, 2.0, np.nan, np.inf, 3.0], [0, 0, 0, 1, 0])
  np.testing.assert_array_equal(states.refused, [False, False, True, True, False])
  np.testing.assert_array_equal(states.count, [0, 1, 1, 1, 2])
  np.testing.assert_array_equal(states.increments[-1], [1, 1, 0, 0])


def test_the_energy_may_be_the_square():
  states = drive(gate.gate(optax.adam(0.1), 0.5, 4, squared=True), [1.0, 3.0], [0, 0])
  assert float(states.increments[-1][0]) == 8


@pytest.mark.parametrize('threshold', [0.1, 0.5, 1.0])
def test_uses_of_a_batch_follow_the_closed_form(threshold):
  """With independent normal increments, sum over j < K of Phi(threshold)^j; the first is free."""
  increments = jnp.asarray(np.random.default_rng(3).standard_normal(20000), jnp.float32)
  tx = gate.gate(optax.identity(), threshold, 64)

  def step(carry, increment):
    state, use = carry
    norm = jnp.where(state.last < 0, 1e4, state.last + increment)
    _, state = tx.update(GRADS, state, PARAMS, head_norm=norm, use=use)
    ends = state.refused | (use == 3)
    return (state, jnp.where(ends, 0, use + 1)), (~state.refused, ends)

  _, (accepted, ends) = jax.jit(
      lambda s: jax.lax.scan(step, (s, jnp.int32(0)), increments))(tx.init(PARAMS))
  mean = accepted[1000:].sum() / ends[1000:].sum()
  chance = 0.5 * (1 + math.erf(threshold / math.sqrt(2)))
  assert abs(mean - sum(chance ** j for j in range(4))) < 0.06


def test_a_window_of_one_is_refused():
  with pytest.raises(ValueError, match='rl.gate.window is 1'):
    gate.gate(optax.adam(0.1), 0.5, 1)
