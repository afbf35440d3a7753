"""Weights and losses: hand-worked numbers, enumerated softmaxes and the laws they must obey."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import losses
from rl_toy import strict_ranks  # noqa: F401

AGGREGATES = {**losses.AGGREGATES, 'constant': losses.constant(4)}

# Row 1 trains one token, row 2 three; a third row trains none.
MASK = np.array([[0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]], np.float32)
LOSS = np.array([[9, 1, 9, 9], [9, 0, 0, 0], [9, 9, 9, 9]], np.float32)


@pytest.mark.parametrize('name, expected', [
    ('token_mean', 0.25), ('sequence_mean', 0.5), ('sequence_sum', 0.5), ('constant', 0.125)])
def test_aggregates_by_hand(name, expected):
  weight = AGGREGATES[name](MASK)
  np.testing.assert_allclose(losses.weighted_sum(LOSS, weight), expected, rtol=1e-6)


@pytest.mark.parametrize('name, expected', [
    ('token_mean', 1), ('sequence_mean', 1), ('sequence_sum', 4 / 2), ('constant', 4 / (2 * 4))])
def test_means_sum_to_one_and_sums_to_the_mean_length(name, expected):
  weight = AGGREGATES[name](MASK)
  np.testing.assert_allclose(weight.sum(), expected, rtol=1e-6)
  np.testing.assert_array_equal(weight[MASK == 0], 0)


@pytest.mark.parametrize('name', AGGREGATES)
def test_a_batch_without_trained_tokens_weighs_nothing(name):
  np.testing.assert_array_equal(AGGREGATES[name](0 * MASK), 0)


def clipped(log_ratio, advantage, low=0.2, high=0.2, dual=3.0):
  return losses.clipped_policy_loss(
      log_ratio, advantage, clip_low=low, clip_high=high, dual_clip=dual)


@pytest.mark.parametrize('advantage, ratio, expected, limited', [
    (1, 1.5, -1.2, 1), (1, 0.5, -0.5, 0), (-1, 1.5, 1.5, 0), (-1, 0.5, 0.8, 1), (-1, 4, 3, 1)])
def test_clipped_loss_by_hand(advantage, ratio, expected, limited):
  log_ratio = jnp.log(jnp.full((1, 1), ratio))
  value, metrics = clipped(log_ratio, jnp.full((1, 1), float(advantage)))
  np.testing.assert_allclose(value, [[expected]], rtol=1e-5)
  np.testing.assert_array_equal(metrics['clip_fraction'], [[limited]])
  np.testing.assert_allclose(metrics['kl_from_old'], [[ratio - 1 - np.log(ratio)]], rtol=1e-5)
  slope = jax.grad(lambda x: clipped(x, jnp.full((1, 1), float(advantage)))[0].sum())(log_ratio)
  np.testing.assert_allclose(slope, [[0 if limited else -advantage * ratio]], rtol=1e-5)


def test_dual_clip_is_only_for_bad_tokens_and_off_at_0():
  far = jnp.log(jnp.full((1, 1), 4.0))
  np.testing.assert_allclose(clipped(far, -jnp.ones((1, 1)), dual=0.0)[0], [[4.0]], rtol=1e-5)
  np.testing.assert_allclose(clipped(-far, jnp.ones((1, 1)), dual=1e-3)[0], [[-0.25]], rtol=1e-5)


def test_the_two_clip_bounds_are_not_exchanged():
  log_ratio = jnp.log(jnp.array([[0.5, 2.0]]))
  bad, _ = clipped(log_ratio, -jnp.ones((1, 2)), 0.1, 0.3, 0.0)
  good, _ = clipped(log_ratio, jnp.ones((1, 2)), 0.1, 0.3, 0.0)
  np.testing.assert_allclose(bad, [[0.9, 2]], rtol=1e-5)
  np.testing.assert_allclose(good, [[-0.5, -1.3]], rtol=1e-5)


# One row of GSPO's hand case, with garbage in the padding.
GAP = jnp.array([[7.0, 0.02, -0.01, 0.05, -9.0]])
ROW = jnp.array([[0.0, 1, 1, 1, 0]])


@pytest.mark.parametrize('advantage, limited', [(1.0, True), (-1.0, False)])
def test_gspo_by_hand(advantage, limited):
  def value(logp):
    log_ratio = losses.sequence_log_ratio(logp, jnp.zeros((1, 5)), ROW)
    return clipped(log_ratio, jnp.full((1, 5), advantage), 3e-4, 4e-4, 0.0)[0]
  ratio = 1.0004 if limited else 1.020201
  np.testing.assert_allclose(value(GAP)[:, 1:4], np.full((1, 3), -advantage * ratio), rtol=1e-5)
  weight = losses.sequence_mean(np.asarray(ROW))
  slope = jax.grad(lambda logp: losses.weighted_sum(value(logp), weight))(GAP)
  inside = 0.0 if limited else 1.020201 / 3
  np.testing.assert_allclose(slope, inside * ROW, rtol=1e-5)


def test_token_ratio_clips_nothing_where_gspo_clips_the_row():
  _, metrics = clipped(losses.token_log_ratio(GAP, jnp.zeros((1, 5)), ROW), jnp.ones((1, 5)))
  np.testing.assert_array_equal(metrics['clip_fraction'] * ROW, 0)


def random_rows(seed=0):
  rng = np.random.default_rng(seed)
  mask = (rng.random((6, 8)) < 0.6).astype(np.float32)
  mask[0] = 0
  normal = lambda scale, width: jnp.asarray(scale * rng.standard_normal((6, width)), jnp.float32)
  return normal(0.1, 8) - 2, normal(0.1, 8) - 2, normal(1.0, 1), mask


def test_gspo_in_token_form_is_its_sequence_form():
  logp, old, row_advantage, mask = random_rows()
  advantage = jnp.broadcast_to(row_advantage, mask.shape)

  def token_form(logp):
    log_ratio = losses.sequence_log_ratio(logp, old, mask)
    value, _ = clipped(log_ratio, advantage, 0.02, 0.03, 0.0)
    return losses.weighted_sum(value, losses.sequence_mean(mask))

  def sequence_form(logp):
    length = mask.sum(1)
    s = jnp.exp(jnp.sum(mask * (logp - old), axis=1) / np.maximum(length, 1))
    a = row_advantage[:, 0]
    value = jnp.maximum(-a * s, -a * jnp.clip(s, 0.98, 1.03))
    return jnp.sum(value * (length > 0)) / (length > 0).sum()

  mine, slope = jax.value_and_grad(token_form)(logp)
  theirs, expected = jax.value_and_grad(sequence_form)(logp)
  moving = np.abs(np.asarray(expected)).sum(1) > 0
  assert 0 < moving.sum() < (mask.any(1)).sum()             # some rows are clipped, some are not
  np.testing.assert_allclose(mine, theirs, rtol=1e-5)
  np.testing.assert_allclose(slope, expected, atol=1e-6)


@pytest.mark.parametrize('ratio', losses.RATIOS)
@pytest.mark.parametrize('name', AGGREGATES)
def test_on_policy_gradient_is_minus_weighted_advantage(ratio, name):
  logp, _, row_advantage, mask = random_rows()
  weight = AGGREGATES[name](mask)
  advantage = jnp.broadcast_to(row_advantage, mask.shape)

  def value(logp, advantage):
    log_ratio = losses.RATIOS[ratio](logp, jax.lax.stop_gradient(logp), mask)
    return losses.weighted_sum(clipped(log_ratio, advantage)[0], weight)

  by_logp, by_advantage = jax.grad(value, (0, 1))(logp, advantage)
  np.testing.assert_allclose(by_logp, -advantage * weight, atol=1e-7)
  np.testing.assert_array_equal(by_advantage, 0)


@pytest.mark.parametrize('ratio', losses.RATIOS)
def test_padding_changes_nothing(ratio):
  logp, old, row_advantage, mask = random_rows()
  advantage = jnp.broadcast_to(row_advantage, mask.shape)

  def value(logp, old):
    loss, _ = clipped(losses.RATIOS[ratio](logp, old, mask), advantage)
    return losses.weighted_sum(loss, losses.sequence_mean(mask))

  outside = jnp.where(mask > 0, 0.0, 30.0)
  both = jax.value_and_grad(value)
  plain = both(logp, old)
  for changed in (both(logp + outside, old), both(logp, old - 2 * outside)):
    np.testing.assert_array_equal(changed[0], plain[0])
    np.testing.assert_array_equal(changed[1], plain[1])


@pytest.mark.parametrize('log_ratio, expected', [
    (0.1, (0.1, 0.005, 0.004837)), (-0.5, (-0.5, 0.125, 0.148721))])
def test_kl_estimators_by_hand(log_ratio, expected):
  logp, ref = jnp.full((1, 1), log_ratio - 3.0), jnp.full((1, 1), -3.0)
  values = [losses.KL[k](logp, ref).item() for k in ('k1', 'k2', 'k3')]
  np.testing.assert_allclose(values, expected, atol=1e-5)
  np.testing.assert_allclose(losses.KL['k3_k2'](logp, ref).item(), expected[2], atol=1e-5)


P = jnp.array([0.3, -0.8, 1.1])
REF = jax.nn.log_softmax(jnp.array([-0.2, 0.5, 0.4]))


def expected_gradient(estimator):
  """Mean over the policy's own samples of the estimator's gradient: all tokens, none drawn."""
  def summed(logits):
    logp = jax.nn.log_softmax(logits)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * losses.KL[estimator](logp, REF))
  return jax.grad(summed)(P)


def kl_gradient(forward):
  def divergence(logits):
    logp = jax.nn.log_softmax(logits)
    gap = jnp.exp(REF) * (REF - logp) if forward else jnp.exp(logp) * (logp - REF)
    return jnp.sum(gap)
  return jax.grad(divergence)(P)


@pytest.mark.parametrize('estimator, expected', [
    ('k1', lambda: jnp.zeros(3)), ('k2', lambda: kl_gradient(False)),
    ('k3', lambda: kl_gradient(True)), ('k3_k2', lambda: kl_gradient(False))])
def test_what_the_gradient_of_a_kl_estimator_is_on_own_samples(estimator, expected):
  np.testing.assert_allclose(expected_gradient(estimator), expected(), atol=1e-6)


@pytest.mark.parametrize('estimator', ['k1', 'k3', 'k3_k2'])
def test_what_a_kl_estimator_is_on_average(estimator):
  logp = jax.nn.log_softmax(P)
  mean = jnp.sum(jnp.exp(logp) * losses.KL[estimator](logp, REF))
  np.testing.assert_allclose(mean, jnp.sum(jnp.exp(logp) * (logp - REF)), rtol=1e-5)


@pytest.mark.parametrize('far', [
    [-1e4, 1e4, -88.0, 88.0, 0.0, -1e30, 1e30], [1e4] * 7, [-1e4] * 7])
def test_values_and_gradients_are_finite_however_far_the_policies_are_apart(far):
  far = jnp.array([far])
  zero, mask = jnp.zeros((1, 7)), jnp.array([[1.0, 1, 1, 1, 1, 0, 0]])
  functions = {k: lambda x, f=f: f(x, zero) for k, f in losses.KL.items()}
  for name, ratio in losses.RATIOS.items():
    for sign in (1.0, -1.0):
      functions[name, sign] = lambda x, r=ratio, s=sign: clipped(r(x, zero, mask), s + zero)[0]
  for name, f in functions.items():
    value, slope = jax.value_and_grad(lambda x: f(x).sum())(far)
    assert np.isfinite(value) and np.isfinite(slope).all(), name
  assert 0 <= losses.k3(far, zero).min() and losses.k3(far, zero).max() == losses.MAX_K3


def test_a_weight_of_0_hides_even_infinity():
  x = jnp.array([[1.0, jnp.inf, jnp.nan]])
  assert losses.weighted_sum(x, jnp.array([[2.0, 0, 0]])) == 2
