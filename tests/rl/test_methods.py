"""Recipes: their losses by hand, what a config may say, and that each of them learns."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rl_toy
from nn.types import LOGP
from rl import losses, methods, texts
from rl.compose import requests
from rl.types import OLD, REFERENCE, Method, Stage
from rl_toy import strict_ranks  # noqa: F401

LENGTH = 9
RECIPES = ('grpo', 'dr_grpo', 'rloo', 'dapo')


def build(*names, **options):
  return methods.build(names, options, max_tokens=LENGTH)


# Two groups of two. Rewards 1 and 0; 2 and 1. Three tokens of row 0 are trained, one of row 3.
MASK = np.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0]], np.float32)
GROUP, REWARD = np.array([4, 4, 2, 2]), {'task': np.array([1.0, 0, 2, 1])}
LOG_RATIO = np.log(np.array([[9, 1.5, 1, 0.7], [9, 0.7, 1.1, 9], [9, 1.25, 1, 1], [9, 1, 9, 9]]))


def by_hand(advantage, low, high, weight):
  """Sum of weight * clipped loss, in float64 and with plain loops."""
  total = 0.0
  for n, t in zip(*np.nonzero(MASK)):
    ratio = np.exp(LOG_RATIO[n, t])
    total -= weight[n, t] * min(
        ratio * advantage[n], min(max(ratio, 1 - low), 1 + high) * advantage[n])
  return total


@pytest.mark.parametrize('name, sign, low, high, weight', [
    ('grpo', 0.5 ** 0.5 / 1, 0.2, 0.2, MASK / MASK.sum(1, keepdims=True) / 4),
    ('dr_grpo', 0.5, 0.2, 0.2, MASK / LENGTH / 4),
    ('rloo', 1.0, 0.2, 0.2, MASK / 4),
    ('dapo', 0.5 ** 0.5, 0.2, 0.28, MASK / 9),
])
def test_recipes_by_hand(name, sign, low, high, weight):
  options = {'grpo': {'eps': 0.0, 'beta': 0.0}, 'dapo': {'eps': 0.0}}.get(name, {})
  method = build(name, **({name: options} if options else {}))
  rec = dataclasses.replace(rl_toy.record(REWARD, GROUP, MASK), results={})
  rec = rl_toy.run(method, dataclasses.replace(
      rec, rows=dataclasses.replace(rec.rows, tokens=rec.rows.tokens[:, :4])))
  now = jnp.asarray(LOG_RATIO - 2, jnp.float32)
  step = rl_toy.batch(method, dataclasses.replace(
      rec, results={OLD: np.full((4, 4), -2, np.float32)}))
  (term,) = method.terms
  given = {LOGP: now, OLD: step.data['policy()/logp']}
  value, _ = term.value(rl_toy.View(given, step, MASK, {}, None))
  actual = losses.weighted_sum(value, step.weights['policy'])
  expected = by_hand(sign * np.array([1, -1, 1, -1]), low, high, weight)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_grpo_asks_for_a_reference_only_with_a_kl():
  assert set(requests(build('grpo'))) == {OLD, REFERENCE}
  assert set(requests(build('grpo', grpo={'beta': 0}))) == {OLD}


def standard():
  rec = rl_toy.record({'task': [1, 0, 1, 0, 0, 1]}, [0, 0, 1, 1, 2, 2])
  old, sampler, reference = map(rl_toy.policy, (1, 2, 3))
  return rl_toy.passes(rec, old=old, sampler=sampler, reference=reference)


@pytest.mark.parametrize('recipe, listed, options', [
    ('grpo', ('group_advantage', 'policy', 'kl'), {}),
    ('dr_grpo', ('centred_advantage', 'policy'), {'policy': {'aggregate': 'constant'}}),
    ('rloo', ('leave_one_out', 'policy'), {'policy': {'aggregate': 'sequence_sum'}}),
    ('dapo', ('overlong', 'mixed_groups', 'group_advantage', 'policy'),
     {'policy': {'aggregate': 'token_mean', 'clip_high': 0.28}}),
])
def test_a_recipe_is_its_pieces_listed(recipe, listed, options):
  whole, parts = build(recipe), build(*listed, **options)
  assert [s.name for s in whole.stages] == [s.name for s in parts.stages]
  of = lambda method: rl_toy.gradient(method, standard(), rl_toy.policy(0))
  for a, b in zip(of(whole), of(parts)):
    np.testing.assert_array_equal(a, b)
  assert np.abs(of(whole)[0]).max() > 0


def test_dapo_without_its_additions_is_grpo_over_tokens():
  plain = build('dapo', dapo={'factor': 0.0, 'clip_high': 0.2})
  parent = build('group_advantage', 'policy', policy={'aggregate': 'token_mean'})
  of = lambda method: rl_toy.gradient(method, standard(), rl_toy.policy(0))
  for a, b in zip(of(plain), of(parent)):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('names, options, message', [
    (('gropo',), {}, "unknown method 'gropo'; did you mean 'grpo'"),
    (('grpo',), {'grpo': {'clip_hihg': 0.3}},
     "unknown option of grpo 'clip_hihg'; did you mean 'clip_high'"),
    (('grpo',), {'dapo': {'clip_high': 0.3}}, "options for 'dapo'"),
    (('grpo',), {'gropo': {'clip_high': 0.3}}, "options for 'gropo'"),
    (('grpo', 'grpo'), {}, "\\['grpo'\\] are named twice"),
    ('grpo', {}, 'got the string'),
    (('grpo',), {'grpo': {'clip_low': '0.3'}}, 'grpo.clip_low is .0.3., wanted float'),
    (('grpo',), {'grpo': {'clip_low': True}}, 'wanted float'),
    (('grpo',), {'grpo': {'clip_low': None}}, 'wanted float'),
    (('grpo',), {'grpo': {'beta': float('nan')}}, 'grpo.beta is nan, wanted a finite number'),
    (('grpo',), {'grpo': {'clip_low': 7.0}}, 'grpo: wanted 0 < clip_low'),
    (('grpo', 'tis'), {'tis': {'on': 'policy'}}, 'tis.on is .policy., wanted tuple'),
    (('grpo', 'tis'), {'tis': {'on': ('polcy',)}}, "unknown terms \\['polcy'\\]"),
    (('dr_grpo',), {'dr_grpo': {'max_tokens': 5}}, 'unknown option of dr_grpo'),
    (('grpo', 'kl'), {}, 'two terms of one name'),
    (('grpo', 'rloo'), {}, 'two terms of one name|two stages|one advantage estimator'),
    (('grpo', 'tis', 'icepop'), {}, 'twice'),
])
def test_what_a_config_may_not_say(names, options, message):
  with pytest.raises(ValueError, match=message):
    methods.build(names, options, max_tokens=LENGTH)


@pytest.mark.parametrize('name', ['dr_grpo', 'dapo', 'overlong'])
def test_methods_that_need_the_response_length_refuse_runs_that_sample_nothing(name):
  with pytest.raises(ValueError, match='samples none'):
    methods.build((name,), {})


def test_a_run_that_samples_nothing_may_use_the_rest():
  assert [t.name for t in methods.build(('sft',), {}).terms] == ['nll']


def test_options_may_be_whole_numbers_lists_and_empty():
  method = build('grpo', 'tis', grpo={'beta': 0}, tis={'on': ['policy']}, dapo={})
  assert [s.on for s in method.stages if s.name == 'tis'] == [('policy',)]


def test_methods_of_the_run_itself_come_first():
  mine = Method(stages=(Stage('task', 'reward', lambda r: r),))
  method = methods.build(('dapo',), {}, mine, max_tokens=LENGTH)
  assert [s.name for s in method.stages] == ['task', 'overlong', 'mixed_groups', 'group_advantage']


@pytest.mark.parametrize('name', methods.METHODS)
def test_every_option_has_a_default_a_config_can_hold(name):
  for value in methods.defaults(name).values():
    assert type(value) in (float, int, str, tuple)
  assert isinstance(methods.METHODS[name](**methods.defaults(name), **length_of(name)), Method)


def length_of(name):
  given = {'max_tokens': LENGTH, 'mtp_depth': 1}
  return {k: given[k] for k in inspect.signature(methods.METHODS[name]).parameters if k in given}


def test_the_plain_text_is_the_row_s_own():
  rec = standard()
  rec = dataclasses.replace(rec, rows=dataclasses.replace(
      rec.rows, start=np.arange(6) % 3 + 1, end=np.arange(6) % 2 + 4))
  plain = texts.TEXTS['plain'](rec)
  assert plain.target is None
  for row, start, end, (prefix,), response in zip(
      rec.rows.tokens, rec.rows.start, rec.rows.end, plain.prefix, texts.responses(rec)):
    assert prefix + response == row[:end].tolist() and len(prefix) == start


def sample(rng, params, num):
  """Rows of the toy policy, all from token 0, drawn with numpy."""
  probability = np.asarray(jax.nn.softmax(params), np.float64)
  tokens = np.zeros((num, rl_toy.T), np.int32)
  for t in range(1, rl_toy.T):
    cumulative = probability[tokens[:, t - 1]].cumsum(1)
    tokens[:, t] = (rng.random((num, 1)) > cumulative / cumulative[:, -1:]).sum(1)
  return tokens


@pytest.mark.parametrize('name', RECIPES)
def test_the_reward_of_a_small_policy_goes_up(name):
  method = build(name)
  rng, params, reference = np.random.default_rng(0), rl_toy.policy(0, 0.3), rl_toy.policy(0, 0.3)
  rate = {'dr_grpo': 6.0, 'rloo': 0.7}.get(name, 3.0)          # their losses differ in scale
  step = jax.jit(jax.grad(lambda p, batch: rl_toy.loss(method.terms, p, batch)[0]))
  rewards = []
  for _ in range(40):
    tokens = sample(rng, params, 64)
    reward = (tokens[:, 1:] == 3).mean(1)                      # say 3 as often as you can
    rec = rl_toy.record({'task': reward}, np.repeat(np.arange(8), 8))
    rec = dataclasses.replace(rec, rows=dataclasses.replace(rec.rows, tokens=tokens))
    rec = rl_toy.run(method, rl_toy.passes(rec, old=params, reference=reference))
    params = params - rate * step(params, rl_toy.batch(method, rec))
    rewards.append(reward.mean())
  assert np.mean(rewards[:3]) < 0.5 and np.mean(rewards[-3:]) > 0.8, rewards
