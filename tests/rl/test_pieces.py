"""Stages and terms: hand-worked numbers, invariances, neutral knobs, values that stay finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rl_toy
from nn.types import Batch
from rl import losses, pieces
from rl.compose import compose, ready
from rl.types import OLD, REFERENCE, SAMPLER, Method
from rl_toy import strict_ranks  # noqa: F401

ESTIMATORS = {
    'group_advantage': pieces.group_advantage(eps=0.0),
    'centred_advantage': pieces.centred_advantage(),
    'leave_one_out': pieces.leave_one_out(),
}
NOW, OTHER, THIRD = rl_toy.policy(0), rl_toy.policy(1), rl_toy.policy(2)


def per_row(method, rec):
  """[N]: the advantage, which must be the same at every trained token and 0 elsewhere."""
  advantage, mask = rl_toy.run(method, rec).advantage, rec.masks['train'] > 0
  assert advantage.dtype == np.float32
  for row, inside in zip(advantage, mask):
    assert len(set(row[inside].tolist())) <= 1 and not row[~inside].any()
  return advantage.sum(1) / np.maximum(mask.sum(1), 1)


@pytest.mark.parametrize('reward, name, expected', [
    ([1, 0, 0, 1], 'group_advantage', [0.866025, -0.866025, -0.866025, 0.866025]),
    ([1, 0, 0, 1], 'centred_advantage', [0.5, -0.5, -0.5, 0.5]),
    ([1, 0, 0, 1], 'leave_one_out', [0.666667, -0.666667, -0.666667, 0.666667]),
    ([1, 0, 0, 0], 'group_advantage', [1.5, -0.5, -0.5, -0.5]),
    ([1, 0, 0, 0], 'centred_advantage', [0.75, -0.25, -0.25, -0.25]),
    ([1, 0, 0, 0], 'leave_one_out', [1, -1 / 3, -1 / 3, -1 / 3]),
    ([1] + 15 * [0], 'group_advantage', [3.75] + 15 * [-0.25]),
])
def test_estimators_by_hand(reward, name, expected):
  actual = per_row(ESTIMATORS[name], rl_toy.record({'task': reward}, [7] * len(reward)))
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_eps_is_added_to_the_deviation():
  rec = rl_toy.record({'task': [1, 0]}, [0, 0])
  np.testing.assert_allclose(
      per_row(pieces.group_advantage(eps=0.5), rec)[0], 0.5 / (0.5 ** 0.5 + 0.5), rtol=1e-6)


@pytest.mark.parametrize('name', ESTIMATORS)
@pytest.mark.parametrize('reward', [0.1, -1 / 3, 0.0, 1e6 + 0.1])
def test_equal_rewards_teach_exactly_nothing(name, reward):
  rec = rl_toy.record({'task': [reward] * 3 + [1, 0]}, [0, 0, 0, 1, 1])
  out = rl_toy.run(ESTIMATORS[name], rec)
  assert not out.advantage[:3].any()
  assert out.advantage[3:].any()
  assert out.notes['groups_with_signal'] == 0.5


def test_rewards_equal_up_to_rounding_teach_nothing():
  rec = rl_toy.record({'a': [0.1, 0.3], 'b': [0.2, 0.0]}, [0, 0])       # 0.1 + 0.2 != 0.3
  out = rl_toy.run(pieces.group_advantage(eps=0.0), rec)
  assert not out.advantage.any() and out.notes['groups_with_signal'] == 0


@pytest.mark.parametrize('name', ESTIMATORS)
def test_a_lone_row_has_no_baseline(name):
  rec = rl_toy.record({'task': [0.7, 1, 0]}, [0, 1, 1])
  np.testing.assert_allclose(per_row(ESTIMATORS[name], rec)[0], 0.7, rtol=1e-6)


REWARD = np.array([1, 0, 0.5, 0.25, 2, 0, 1, 1])
GROUP = np.array([3, 5, 3, 5, 3, 5, 5, 9])


@pytest.mark.parametrize('name', ESTIMATORS)
def test_groups_are_found_by_number_not_by_place(name):
  whole = per_row(ESTIMATORS[name], rl_toy.record({'task': REWARD}, GROUP))
  for g in (3, 5, 9):
    mine = GROUP == g
    alone = per_row(ESTIMATORS[name], rl_toy.record({'task': REWARD[mine]}, GROUP[mine]))
    np.testing.assert_allclose(whole[mine], alone, rtol=1e-6)


@pytest.mark.parametrize('name', ESTIMATORS)
def test_invariances(name):
  method = ESTIMATORS[name]
  base = per_row(method, rl_toy.record({'task': REWARD[:7]}, GROUP[:7]))
  order = np.array([4, 1, 6, 0, 3, 2, 5])
  permuted = per_row(method, rl_toy.record({'task': REWARD[order]}, GROUP[order]))
  relabelled = per_row(method, rl_toy.record({'task': REWARD[:7]}, 100 - GROUP[:7]))
  shifted = per_row(method, rl_toy.record({'task': REWARD[:7] + GROUP[:7] / 4}, GROUP[:7]))
  scaled = per_row(method, rl_toy.record({'task': 3 * REWARD[:7]}, GROUP[:7]))
  np.testing.assert_allclose(permuted, base[order], atol=1e-6)
  np.testing.assert_allclose(relabelled, base, atol=1e-6)
  np.testing.assert_allclose(shifted, base, atol=1e-6)
  np.testing.assert_allclose(scaled, base if name == 'group_advantage' else 3 * base, atol=1e-6)


def test_components_add_up_and_an_inactive_one_adds_nothing():
  nan = np.nan
  parts = {'task': [1, 0, nan, nan], 'form': [0.5, nan, 0.25, nan]}
  rec = rl_toy.record(parts, [0] * 4)
  np.testing.assert_array_equal(pieces.total(rec), [1.5, 0, 0.25, 0])
  one = rl_toy.record({'task': [1.5, 0, 0.25, 0]}, [0] * 4)
  np.testing.assert_array_equal(
      per_row(pieces.group_advantage(), rec), per_row(pieces.group_advantage(), one))


def test_no_reward_at_all_is_an_error():
  with pytest.raises(ValueError, match='no reward to learn from'):
    rl_toy.run(pieces.group_advantage(), rl_toy.record({}, [0, 0]))
  with pytest.raises(ValueError, match='overlong'):
    rl_toy.run(pieces.mixed_groups(), rl_toy.record({'overlong': [0, 1]}, [0, 0]))


def test_groups_with_signal_counts_groups_that_train():
  mask = np.ones((7, rl_toy.T))
  mask[5:] = 0                                     # a group that fills up the batch
  rec = rl_toy.record({'task': [1, 0, 1, 1, 1, 0, 1]}, [0, 0, 1, 1, 1, 2, 2], mask)
  assert rl_toy.run(pieces.group_advantage(), rec).notes['groups_with_signal'] == 0.5


def test_overlong_by_hand():
  mask = np.arange(20) < np.array([[10], [16], [17], [18], [20]])
  rec = rl_toy.record({'task': [1] * 5}, [0] * 5, mask)
  reward = rl_toy.run(pieces.overlong(20, share=0.2), rec).reward
  np.testing.assert_allclose(reward['overlong'], [0, 0, -0.25, -0.5, -1], atol=1e-12)
  np.testing.assert_array_equal(reward['task'], 1)
  twice = rl_toy.run(pieces.overlong(20, share=0.2, factor=2.0), rec).reward['overlong']
  np.testing.assert_allclose(twice, 2 * reward['overlong'])
  assert pieces.overlong(20, factor=0.0) == Method()


def test_shuffled_rewards_keep_their_values_and_lose_their_rows():
  rec = rl_toy.record({'task': np.arange(32), 'form': 100 + np.arange(32)}, np.arange(32) // 4)
  def shuffled(step, seed=0):
    method = pieces.shuffled_rewards(seed)
    return rl_toy.run(method, dataclasses.replace(rec, step=step)).reward
  once = shuffled(3)
  np.testing.assert_array_equal(np.sort(once['task']), np.arange(32))
  np.testing.assert_array_equal(once['form'], 100 + once['task'])
  assert (once['task'] // 4 != rec.rows.group).mean() > 0.5
  np.testing.assert_array_equal(once['task'], shuffled(3)['task'])
  assert (once['task'] != shuffled(4)['task']).any()
  assert (once['task'] != shuffled(3, seed=1)['task']).any()


def test_shuffled_rewards_say_nothing_about_the_rows():
  """Half of 512 rows are good, whole groups of them; good rows get 1/2 within 4 deviations."""
  group = np.arange(512) // 8
  rec = rl_toy.record({'task': group % 2}, group)
  assert not rl_toy.run(pieces.mixed_groups(), rec).keep.any()
  out = rl_toy.run(compose(pieces.shuffled_rewards(), pieces.mixed_groups()), rec)
  assert abs(out.reward['task'][group % 2 == 1].mean() - 0.5) < 4 * 0.5 / 16 / 2 ** 0.5
  assert out.keep.mean() > 0.9


def test_mixed_groups_keeps_whole_groups_with_both_outcomes():
  group = [0, 1, 2, 0, 1, 2, 3]
  rec = rl_toy.record({'task': [1, 1, 0, 0, 1, 0, 1]}, group)
  keep = rl_toy.run(pieces.mixed_groups(), rec).keep
  np.testing.assert_array_equal(keep, [True, False, False, True, False, False, False])


def test_a_length_penalty_alone_does_not_make_a_group_mixed():
  parts = {'task': [0, 0, 1, 0], 'overlong': [-1, 0, 0, 0]}
  rec = rl_toy.record(parts, [0, 0, 1, 1])
  np.testing.assert_array_equal(rl_toy.run(pieces.mixed_groups(), rec).keep, [0, 0, 1, 1])
  np.testing.assert_array_equal(rl_toy.run(pieces.mixed_groups(ignore=()), rec).keep, [1, 1, 1, 1])


def test_filters_keep_only_what_all_of_them_keep():
  rec = rl_toy.record({'task': [1, 0, 1, 0]}, [0, 0, 1, 1])
  rec = dataclasses.replace(rec, keep=np.array([True, True, False, False]))
  np.testing.assert_array_equal(rl_toy.run(pieces.mixed_groups(), rec).keep, [1, 1, 0, 0])


def mismatched(ratios, mask=None):
  """A record whose old policy is `ratios` times as likely as the sampler at every position."""
  ratios = np.atleast_2d(np.asarray(ratios, np.float64))
  mask = np.ones(ratios.shape) if mask is None else mask
  rec = rl_toy.record({'task': [0] * len(ratios)}, [0] * len(ratios), mask)
  gap = np.log(ratios).astype(np.float32)
  return dataclasses.replace(rec, results={OLD: gap - 1, SAMPLER: np.full_like(gap, -1)})


HAND = [0.3, 0.9, 1.8, 6]


@pytest.mark.parametrize('method, expected', [
    (pieces.tis(cap=2.0), [0.3, 0.9, 1.8, 2]),
    (pieces.mis(cap=2.0), [0.3, 0.9, 1.8, 0]),
    (pieces.icepop(low=0.5, high=5.0), [0, 0.9, 1.8, 0]),
    (pieces.tis(cap=5.0, level='sequence'), [2.916] * 4),
    (pieces.tis(cap=2.0, level='sequence'), [2] * 4),
    (pieces.mis(cap=3.0, level='sequence'), [2.916] * 4),
    (pieces.mis(cap=2.0, level='sequence'), [0] * 4),
    (pieces.geometric(1.306762, 1.306764), [1] * 4),
    (pieces.geometric(1.306764, 2.0), [0] * 4),
    (pieces.geometric(0.5, 1.306762), [0] * 4),
])
def test_mismatch_weights_by_hand(method, expected):
  weight = rl_toy.run(method, mismatched(HAND)).weight['policy']
  np.testing.assert_allclose(weight, [expected], rtol=1e-5)


def test_how_many_ratios_are_limited_is_noted():
  mask = np.array([[0, 1, 1, 1]])
  notes = rl_toy.run(pieces.icepop(0.5, 5.0), mismatched([9, *HAND[1:]], mask)).notes
  np.testing.assert_allclose(notes['icepop_limited'], 1 / 3)
  assert rl_toy.run(pieces.tis(level='sequence'), mismatched(HAND, mask)).notes['tis_limited'] == 1


@pytest.mark.parametrize('method', [
    pieces.tis(level='sequence'), pieces.mis(cap=9.0, level='sequence'),
    pieces.geometric(0.9, 1.1)])
def test_only_trained_tokens_make_a_row_s_ratio(method):
  mask = np.array([[1.0, 1, 0, 0]])
  plain = rl_toy.run(method, mismatched([1.02, 1.01, 1, 1], mask)).weight['policy']
  changed = rl_toy.run(method, mismatched([1.02, 1.01, 1e4, 1e-4], mask)).weight['policy']
  np.testing.assert_array_equal(plain, changed)
  assert plain[0, 0] > 0


def test_weighers_multiply_what_is_there_for_the_terms_they_name():
  before = {'policy': np.array([2.0, 3.0]), 'kl': np.full((2, 4), 5.0), 'nll': np.ones(2)}
  rec = dataclasses.replace(mismatched([HAND, [1] * 4]), weight=before)
  after = rl_toy.run(pieces.tis(on=('policy', 'kl')), rec).weight
  np.testing.assert_allclose(after['policy'], [[0.6, 1.8, 3.6, 4], [3] * 4], rtol=1e-6)
  np.testing.assert_allclose(after['kl'], [[1.5, 4.5, 9, 10], [5] * 4], rtol=1e-6)
  assert after['nll'] is before['nll'] and before['policy'].shape == (2,)


def test_no_mismatch_weight_is_beyond_20_nats():
  rec = mismatched([[1, 1], [1, 1]])
  rec = dataclasses.replace(rec, results={OLD: np.array([[-900.0, 0], [0, -900]]),
                                          SAMPLER: np.array([[0, -900.0], [-900, 0]])})
  for method in (pieces.tis(cap=1e30), pieces.tis(cap=1e30, level='sequence'), pieces.mis(),
                 pieces.icepop(), pieces.geometric()):
    assert rl_toy.run(method, rec).weight['policy'].max() <= np.float32(np.exp(20))


def standard(seed=0):
  """Eight rows of three groups, ragged masks, three different policies."""
  rng = np.random.default_rng(seed)
  mask = (rng.random((8, rl_toy.T)) < 0.7) & (np.arange(rl_toy.T) > 0)
  mask[2] = False
  rec = rl_toy.record({'task': rng.integers(0, 3, 8) / 2}, [0, 1, 0, 2, 1, 2, 0, 1], mask, seed)
  return rl_toy.passes(rec, old=OTHER, sampler=THIRD, reference=THIRD)


BASE = (pieces.centred_advantage(), pieces.policy())


@pytest.mark.parametrize('extra', [
    pieces.kl(coef=0.0), pieces.entropy(coef=0.0), pieces.sft(coef=0.0), Method(),
    pieces.overlong(rl_toy.T, factor=0.0),
    compose(pieces.kl(coef=0.0), pieces.tis(on=('kl',))),
])
def test_a_neutral_knob_changes_no_bit(extra):
  plain, mixed = ready(compose(*BASE)), ready(compose(*BASE, extra))
  assert len(mixed.stages) == len(plain.stages) and len(mixed.terms) == len(plain.terms)
  for a, b in zip(rl_toy.gradient(plain, standard(), NOW), rl_toy.gradient(mixed, standard(), NOW)):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('extra', [
    pieces.tis(), pieces.mis(), pieces.icepop(), pieces.geometric(), pieces.tis(level='sequence')])
def test_a_sampler_that_agrees_changes_no_bit(extra):
  rec = rl_toy.passes(standard(), old=OTHER, sampler=OTHER)
  plain, mixed = ready(compose(*BASE)), ready(compose(*BASE, extra))
  for a, b in zip(rl_toy.gradient(plain, rec, NOW), rl_toy.gradient(mixed, rec, NOW)):
    np.testing.assert_array_equal(a, b)


def test_gspo_on_rows_of_one_token_is_ppo():
  rec = standard()
  mask = rec.masks['train'] * (np.cumsum(rec.masks['train'], 1) == 1)
  rec = dataclasses.replace(rec, masks={'train': mask})
  token, sequence = (compose(pieces.centred_advantage(), pieces.policy(ratio=r))
                     for r in ('token', 'sequence'))
  for a, b in zip(rl_toy.gradient(token, rec, NOW), rl_toy.gradient(sequence, rec, NOW)):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_sampler_as_old_policy_is_the_importance_weight_of_an_unclipped_first_step():
  wide = dict(clip_low=1.0, clip_high=1e6)
  rec = rl_toy.passes(standard(), old=NOW, sampler=THIRD)
  bypass = compose(pieces.centred_advantage(), pieces.policy(old='sampler', **wide))
  weighted = compose(pieces.centred_advantage(), pieces.policy(**wide), pieces.tis(cap=1e6))
  a, b = rl_toy.gradient(bypass, rec, NOW)[0], rl_toy.gradient(weighted, rec, NOW)[0]
  assert np.abs(a).max() > 0.01
  np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize('aggregate', [*losses.AGGREGATES, 'constant'])
def test_on_policy_gradient_is_reinforce(aggregate):
  method = compose(pieces.centred_advantage(), pieces.policy(aggregate=aggregate, max_tokens=5))
  rec = rl_toy.run(method, rl_toy.passes(standard(), old=NOW))
  weight = rl_toy.batch(method, rec).weights['policy']

  def reinforce(params):
    logp = rl_toy.scores(params, rec.rows.tokens)[rl_toy.LOGP]
    return -jnp.sum(weight * rec.advantage * logp)

  actual, _ = rl_toy.gradient(method, rec, NOW)
  np.testing.assert_allclose(actual, jax.grad(reinforce)(NOW), atol=1e-6)


TERMS = {
    'policy': pieces.policy(clip_low=0.5, clip_high=0.5, dual_clip=2.0),
    'policy of rows': pieces.policy(ratio='sequence', clip_low=0.3, clip_high=0.3),
    'policy, constant': pieces.policy(aggregate='constant', max_tokens=7),
    'k1': pieces.kl('k1'), 'k2': pieces.kl('k2', aggregate='token_mean'), 'k3': pieces.kl('k3'),
    'entropy': pieces.entropy(coef=0.5), 'nll': pieces.sft(),
}


@pytest.mark.parametrize('name', TERMS)
def test_gradients_are_finite_differences(name):
  method = compose(pieces.centred_advantage(), TERMS[name])
  step = rl_toy.batch(method, rl_toy.run(method, standard()))
  with jax.enable_x64(True):
    value = jax.jit(lambda p: rl_toy.loss(method.terms, p, step)[0])
    params = jnp.asarray(NOW, jnp.float64)
    slope = np.asarray(jax.grad(value)(params))
    expected = np.zeros_like(slope)
    for at in np.ndindex(*slope.shape):
      up, down = value(params.at[at].add(1e-5)), value(params.at[at].add(-1e-5))
      expected[at] = (up - down) / 2e-5
  assert np.abs(slope).max() > 1e-4
  np.testing.assert_allclose(slope, expected, atol=1e-6)     # measured: 1e-7, from float32 data


@pytest.mark.parametrize('name', TERMS)
def test_what_is_not_trained_changes_nothing_and_all_is_finite(name):
  method = compose(pieces.centred_advantage(), TERMS[name])
  rec = standard()
  outside = rec.masks['train'] == 0
  wild = {k: np.where(outside, np.float32(-1e4), v) for k, v in rec.results.items()}
  plain = rl_toy.gradient(method, rec, NOW)
  changed = rl_toy.gradient(method, dataclasses.replace(rec, results=wild), NOW)
  for a, b in zip(plain, changed):
    np.testing.assert_array_equal(a, b)
  step = rl_toy.batch(method, rl_toy.run(method, dataclasses.replace(rec, results=wild)))
  for value, metrics in rl_toy.loss(method.terms, NOW, step)[1].values():
    for x in (value, *metrics.values()):
      assert x.shape == rec.masks['train'].shape and np.isfinite(x).all()


def test_the_mask_of_sft_is_its_own():
  rec = standard()
  demo = np.zeros_like(rec.masks['train'])
  demo[1, 2:4] = 1
  rec = dataclasses.replace(rec, masks=rec.masks | {'demo': demo})
  _, value = rl_toy.gradient(pieces.sft(mask='demo'), rec, NOW)
  logp = rl_toy.scores(NOW, rec.rows.tokens)[rl_toy.LOGP]
  np.testing.assert_allclose(value, -logp[1, 2:4].mean(), rtol=1e-6)


@pytest.mark.parametrize('estimator, expected', [
    ('k1', 0.1), ('k2', 0.005), ('k3', 0.004837), ('k3_k2', 0.004837)])
def test_kl_of_a_uniform_policy_by_hand(estimator, expected):
  """0.1 nats above the reference at every token."""
  rec = standard()
  below = np.full_like(rec.results[REFERENCE], -np.log(rl_toy.V) - 0.1)
  rec = dataclasses.replace(rec, results=rec.results | {REFERENCE: below})
  _, value = rl_toy.gradient(pieces.kl(estimator, coef=2.0), rec, 0 * NOW)
  np.testing.assert_allclose(value, 2 * expected, rtol=1e-4)


def test_entropy_bonus_of_a_uniform_policy_by_hand():
  _, value = rl_toy.gradient(pieces.entropy(coef=0.1), standard(), 0 * NOW)
  np.testing.assert_allclose(value, -0.1 * np.log(rl_toy.V), rtol=1e-6)


def test_a_policy_term_without_an_estimator_says_so():
  step = Batch(*[None] * 9)
  term = pieces.policy().terms[0]
  with pytest.raises(ValueError, match='name an estimator'):
    term.value(rl_toy.View({}, step, None, {}, None))


@pytest.mark.parametrize('make, word', [
    (lambda: pieces.group_advantage(eps=-1.0), 'eps'),
    (lambda: pieces.overlong(0), 'max_tokens'),
    (lambda: pieces.overlong(10, share=0.0), 'share'),
    (lambda: pieces.policy(clip_low=0.0), 'clip_low'),
    (lambda: pieces.policy(clip_low=1.5), 'clip_low'),
    (lambda: pieces.policy(clip_high=0.0), 'clip_high'),
    (lambda: pieces.policy(dual_clip=1.1), 'dual_clip'),
    (lambda: pieces.policy(ratio='seqence'), "did you mean 'sequence'"),
    (lambda: pieces.policy(aggregate='tokenmean'), "did you mean 'token_mean'"),
    (lambda: pieces.policy(aggregate='constant'), 'max_tokens'),
    (lambda: pieces.policy(old='sampled'), "did you mean 'sampler'"),
    (lambda: pieces.kl('k4'), 'unknown estimator'),
    (lambda: pieces.tis(cap=0.0), 'cap'),
    (lambda: pieces.mis(cap=-1.0), 'cap'),
    (lambda: pieces.tis(level='row'), 'unknown level'),
    (lambda: pieces.icepop(low=2.0, high=1.0), 'low'),
    (lambda: pieces.geometric(low=-1.0), 'low'),
])
def test_options_without_sense_are_refused(make, word):
  with pytest.raises(ValueError, match=word):
    make()
