"""The train step.

Microbatches and devices change nothing, a bad step changes nothing, sums are of the whole step.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch import step as step_lib
from nn import param
from nn.param import Spec
from nn.types import LOGP, Batch, Output
from rl.types import OLD, Term, label, token_mean

N, T, V = 8, 6, 5
SPECS = {'w': Spec((V, V), ('vocab', 'embed'), param.normal(0.5)),
         'b': Spec((V,), ('embed',), param.normal(0.5), trainable=False)}


def forward(params, batch, wants):
  """A bigram model: logits of token t are a row of w, chosen by token t - 1."""
  del wants
  logp = jax.nn.log_softmax(params['w'][batch.tokens[:, :-1]] + params['b'])
  taken = jnp.take_along_axis(logp, batch.tokens[:, 1:, None], axis=2)[..., 0]
  return {LOGP: jnp.pad(taken, ((0, 0), (1, 0)))}, Output(hidden=logp)


def nll(view):
  return -view.given[LOGP], {'seen': jnp.ones_like(view.mask)}


def batch_of(terms, seed=0, **changes):
  rng = np.random.default_rng(seed)
  mask = (rng.random((N, T)) < 0.7).astype(np.float32)
  mask[:, 0] = 0
  old = -rng.random((N, T)).astype(np.float32)
  inside = np.ones((N, T), np.int32)
  batch = Batch(
      tokens=rng.integers(0, V, (N, T)).astype(np.int32), positions=inside, segments=inside,
      masks={'train': mask},
      weights={t.name: t.aggregate(mask).astype(np.float32) for t in terms},
      coef={t.name: np.float32(t.coef) for t in terms}, data={label(OLD): old},
      temperature=np.float32(1), use=np.int32(0))
  return dataclasses.replace(batch, **changes)


def rate_given():
  """Plain gradient descent at the rate it is told."""
  return optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(),
      lambda g, s, p=None, *, learning_rate, **extra: (
          jax.tree.map(lambda x: -learning_rate * x, g), s))


NLL = Term('nll', nll, (LOGP,))
# A ratio of sums over the whole optimiser step, as OCC's coefficient is.
RATIO = Term(
    'ratio', lambda v: (v.sums['a'] / v.sums['b'] * v.given[LOGP], {}), (LOGP, OLD), coef=0.5,
    sums=lambda v: {'a': jnp.sum(v.mask * v.given[LOGP] * v.given[OLD]), 'b': jnp.sum(v.mask)})
PARAMS = param.init(jax.random.key(1), SPECS)


def gradient(terms, microbatches, batch=None, params=PARAMS):
  batch = batch_of(terms) if batch is None else batch
  return jax.jit(step_lib.make_gradient(
      step_lib.make_loss(forward, terms), SPECS, microbatches))(params, batch)


def test_gradient_by_hand():
  grads, metrics = gradient((NLL,), 1)
  batch = batch_of((NLL,))
  w, b = np.asarray(PARAMS['w'], np.float64), np.asarray(PARAMS['b'], np.float64)
  expected, loss = np.zeros((V, V)), 0.0
  for n in range(N):
    for t in range(1, T):
      before, token, weight = (
          batch.tokens[n, t - 1], batch.tokens[n, t],
          batch.masks['train'][n, t] / batch.masks['train'].sum())
      p = np.exp(w[before] + b) / np.exp(w[before] + b).sum()
      expected[before] += weight * (p - np.eye(V)[token])
      loss -= weight * np.log(p[token])
  np.testing.assert_allclose(grads['w'], expected, atol=1e-6)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics['nll/seen'], 1, rtol=1e-6)
  assert set(grads) == {'w'}, 'frozen parameters have no gradient'


@pytest.mark.parametrize('terms', [(NLL,), (NLL, RATIO)])
@pytest.mark.parametrize('microbatches', [2, 8])
def test_microbatches_change_nothing(terms, microbatches):
  whole, parts = gradient(terms, 1), gradient(terms, microbatches)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole, parts)


@pytest.mark.parametrize('microbatches', [1, 8])
def test_what_a_term_reports_is_a_mean_whatever_its_weights_sum_to(microbatches):
  term = dataclasses.replace(
      NLL, value=lambda v: (-v.given[LOGP], {'late': jnp.arange(T) * v.mask}))
  batch = batch_of((term,))
  mask = batch.masks['train']
  expected = (mask * np.arange(T)).sum() / mask.sum()
  for scale in (1, 0.01, 0):           # a constant denominator, and a batch without a trained token
    changed = dataclasses.replace(batch, weights={'nll': scale * batch.weights['nll']})
    metrics = gradient((term,), microbatches, changed)[1]
    np.testing.assert_allclose(metrics['nll/late'], expected if scale else 0, rtol=1e-5)
    assert 'nll/weight' not in metrics


def test_sums_of_a_microbatch_would_be_another_loss():
  """The law above is not empty: with sums of every microbatch by itself the gradient differs."""
  alone = dataclasses.replace(RATIO, sums=None, value=lambda v: RATIO.value(
      dataclasses.replace(v, sums=RATIO.sums(v))))
  gap = gradient((NLL, RATIO), 1)[0]['w'] - gradient((NLL, alone), 8)[0]['w']
  assert np.abs(gap).max() > 1e-3


def test_sums_carry_no_gradient():
  terms = (RATIO,)
  batch = batch_of(terms)
  value, sums = step_lib.make_loss(forward, terms)
  fixed = {'ratio': sums(PARAMS, batch)['ratio']}
  free, held = (jax.grad(lambda p: value(p, batch, s)[0])(PARAMS)['w'] for s in ({}, fixed))
  np.testing.assert_allclose(free, held, atol=1e-7)


def test_eight_devices_change_nothing():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows, every = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*p))
                 for p in (('data',), ()))
  batch = batch_of((NLL, RATIO))
  spread = jax.device_put(batch, jax.tree.map(lambda x: rows if np.ndim(x) else every, batch))
  one, eight = (gradient((NLL, RATIO), 1, batch),
                gradient((NLL, RATIO), 1, spread, jax.device_put(PARAMS, every)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, eight)


def test_old_without_a_pass_is_the_forward_itself():
  """Where collect made no pass for OLD, it is the detached forward.

  The ratio is 1 and its gradient that of logp.
  """
  term = Term('ratio', lambda v: (-jnp.exp(v.given[LOGP] - v.given[OLD]), {}), (LOGP, OLD))
  batch = batch_of((term,), data={})
  grads, metrics = gradient((term,), 1, batch)
  plain, _ = gradient((Term('ratio', nll, (LOGP,)),), 1, batch)
  np.testing.assert_allclose(metrics['loss'], -1, rtol=1e-6)
  np.testing.assert_allclose(grads['w'], plain['w'], atol=1e-7)


def test_a_term_reads_detached_values_of_an_earlier_one():
  later = Term('later', lambda v: (v.done['nll'] * v.given[LOGP], {}), (LOGP,), after=('nll',))
  batch = batch_of((NLL, later))
  value, _ = step_lib.make_loss(forward, (NLL, later))
  grads = jax.grad(lambda p: value(p, batch, {})[0])(PARAMS)['w']

  def by_hand(p):
    logp = forward(p, batch, ())[0][LOGP]
    return jnp.sum(batch.weights['nll'] * (-logp - jax.lax.stop_gradient(logp) * logp))

  np.testing.assert_allclose(grads, jax.grad(by_hand)(PARAMS)['w'], atol=1e-6)


def test_sums_over_values_that_need_sums_are_refused():
  later = Term('later', nll, (LOGP,), after=('ratio',), sums=lambda v: {})
  with pytest.raises(ValueError, match="'later' forms sums over values of \\['ratio'\\]"):
    step_lib.make_loss(forward, (RATIO, later))


def step_once(batch, microbatches=1):
  tx = optax.chain(optax.scale_by_adam(), rate_given())
  train_step = jax.jit(step_lib.make_train_step(
      step_lib.make_loss(forward, (NLL,)), tx, SPECS, microbatches))
  state = step_lib.TrainState(jnp.int32(0), PARAMS, tx.init(param.split(PARAMS, SPECS)[0]))
  return state, *train_step(state, batch, np.float32(0.1))


def test_a_step_moves_the_trainable_parameters_only():
  old, new, metrics = step_once(batch_of((NLL,)))
  assert np.abs(new.params['w'] - old.params['w']).max() > 0.05
  np.testing.assert_array_equal(new.params['b'], old.params['b'])
  assert int(new.updates) == 1 and float(metrics['nonfinite']) == 0


@pytest.mark.parametrize('microbatches', [1, 4])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad, microbatches):
  batch = batch_of((NLL,))
  batch.weights['nll'][3, 2] = bad
  old, new, metrics = step_once(batch, microbatches)
  assert float(metrics['nonfinite']) == 1
  jax.tree.map(np.testing.assert_array_equal, new, old)


def test_pairs_stay_together_in_microbatches():
  """The partner of row i is row i + n/2, before and after the split."""
  pair = np.tile(np.arange(N // 2), 2)
  parts = step_lib.split(
      batch_of((NLL,), use=np.int32(0), tokens=np.repeat(pair[:, None], T, 1)), 2)
  for part in np.asarray(parts.tokens):
    np.testing.assert_array_equal(part[:len(part) // 2], part[len(part) // 2:])


def test_token_mean_is_formed_over_the_optimiser_step():
  mask = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
  np.testing.assert_allclose(token_mean(mask).sum(), 1)


@pytest.mark.parametrize('microbatches', [1, 2])
def test_loads_are_those_of_the_whole_step_and_move_what_no_gradient_does_once(microbatches):
  def with_experts(params, batch, wants):
    scores, output = forward(params, batch, wants)
    load = jnp.sum(batch.tokens[..., None] == jnp.arange(V), axis=(0, 1), dtype=jnp.int32)
    return scores, output.replace(load={3: load}, aux_loss={'balance': jnp.sum(params['w']**2)})

  def after_update(params, load):
    return params | {'b': params['b'] + load[3]}

  step = jax.jit(step_lib.make_train_step(
      step_lib.make_loss(with_experts, (NLL,)), rate_given(), SPECS, microbatches, after_update))
  state, batch = step_lib.TrainState(jnp.int32(0), PARAMS, optax.EmptyState()), batch_of((NLL,))
  new, metrics = step(state, batch, 0.1)
  counts = np.bincount(batch.tokens.ravel(), minlength=V)
  np.testing.assert_allclose(new.params['b'] - PARAMS['b'], counts, rtol=1e-5)
  np.testing.assert_allclose(metrics['load/violation'], counts.max() / counts.mean() - 1, rtol=1e-5)
  # A mean over tokens, of which every microbatch has the share of its weight.
  np.testing.assert_allclose(metrics['aux/balance'], np.square(PARAMS['w']).sum(), rtol=1e-5)
  np.testing.assert_allclose(metrics['loss'], metrics['nll'] + metrics['aux/balance'], rtol=1e-5)

  bad = dataclasses.replace(batch, weights={'nll': batch.weights['nll'] * np.float32(np.nan)})
  refused, metrics = step(state, bad, 0.1)
  assert metrics['nonfinite'] == 1
  jax.tree.map(np.testing.assert_array_equal, refused.params, PARAMS)
