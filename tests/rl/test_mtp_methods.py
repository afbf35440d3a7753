"""Four regimes of multi-token prediction: OCC's coefficient, and what each sends to the model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from launch import engine
from launch import step as step_lib
from nn import model, param
from nn.config import MTP, ModelConfig
from nn.param import Spec
from nn.types import LOGP, Batch, Output, Want, draft, mtp
from rl import methods, pieces
from rl.compose import compose, ready, requests
from rl.methods import mtp as mtp_methods
from rl.types import OLD, Score, View, label

N, T, V = 8, 7, 5
TABLE = lambda: Spec((V, V), ('vocab', 'embed'), param.normal(0.5))
SPECS = {'w': TABLE(), 'head': TABLE()}
PARAMS = param.init(jax.random.key(1), SPECS)


def occ(**options):
  return mtp_methods.mtp_occ(options.pop('mtp_depth', 1), max_tokens=T, **options)


# ---- The coefficient, by numbers

RNG = np.random.default_rng(0)
MASK = (np.arange(400) < 300).astype(np.float32)
AHEAD = (RNG.standard_normal(400) * MASK).astype(np.float32)
MOVED = ((0.05 * AHEAD + 0.01 * RNG.standard_normal(400)) * MASK).astype(np.float32)


def told(moved, ahead, mask=MASK, elsewhere=0.0, known=1.0, **options):
  """What OCC tells of one row whose model and head have moved by so much since `old`."""
  old = np.where(mask > 0, -1.0, elsewhere).astype(np.float32)
  row = lambda x: jnp.asarray(x, jnp.float32)[None]
  term = mtp_methods.mtp_occ(1, max_tokens=len(mask), **options).terms[-1]
  given = {OLD: row(old), LOGP: row(old + moved), mtp(1): row(old + ahead),
           draft(1): (row(known + 0 * mask),) * 3}
  given |= {n: row(old - 0.5) for n in term.needs if isinstance(n, Score) and n != OLD}
  view = View(given, Batch(*[None] * 9, advantage=row(1 + 0 * mask)), row(mask), {}, None)
  metrics = term.value(dataclasses.replace(view, sums=term.sums(view)))[1]
  assert all(x.shape == (1, len(mask)) for x in metrics.values())
  return {name: float(x[0, 0]) for name, x in metrics.items()}


def coefficient(*args, **options):
  return told(*args, **options)['lambda1']


def test_the_coefficient_is_the_slope():
  expected = (MOVED * AHEAD).sum() / (AHEAD ** 2).sum()
  found = told(MOVED, AHEAD)
  np.testing.assert_allclose(found['lambda1'], expected, rtol=1e-4)
  assert abs(found['lambda1'] - 0.05) < 0.003 and found['active1'] == 1
  np.testing.assert_allclose(
      [found['c1'], found['v21']], [(MOVED * AHEAD).sum(), (AHEAD ** 2).sum()], rtol=1e-4)
  np.testing.assert_allclose(coefficient(MOVED, AHEAD, plus=0.5), expected / 2, rtol=1e-4)
  assert coefficient(MOVED, AHEAD, clip=0.02) == pytest.approx(0.02)
  assert coefficient(-MOVED, AHEAD, clip=0.02) == pytest.approx(-0.02)


def test_its_laws():
  whole = coefficient(MOVED, AHEAD)
  assert coefficient(0 * MOVED, AHEAD) == 0 and told(0 * MOVED, AHEAD)['active1'] == 0
  np.testing.assert_allclose(coefficient(-MOVED, AHEAD), -whole, rtol=1e-4)
  np.testing.assert_allclose(coefficient(MOVED, 2 * AHEAD), whole / 2, rtol=1e-4)
  np.testing.assert_allclose(coefficient(2 * MOVED, AHEAD), 2 * whole, rtol=1e-4)
  outside = np.where(MASK > 0, 0, 3.0).astype(np.float32)
  assert coefficient(MOVED + outside, AHEAD - outside, elsewhere=5.0) == whole
  assert coefficient(MOVED, AHEAD, known=0.0) == 0


def test_the_released_form_is_a_mean_of_ratios_over_padding_too():
  ratio = (MOVED * AHEAD / (AHEAD ** 2 + 1e-4))[:300]
  np.testing.assert_allclose(
      coefficient(MOVED, AHEAD, average='ratios', eps=1e-4), ratio.mean() * 300 / 400, rtol=1e-3)


def test_a_head_may_start_from_what_it_said_itself():
  expected = (MOVED * (AHEAD + 0.5) * MASK).sum() / ((AHEAD + 0.5) ** 2 * MASK).sum()
  np.testing.assert_allclose(coefficient(MOVED, AHEAD, old='own'), expected, rtol=1e-4)
  assert Score(requests(occ(old='own'))[-1].source, mtp(1)) in requests(occ(old='own'))
  assert requests(occ()) == (OLD,)


def test_under_an_isotropic_map_it_is_the_best_multiple_of_the_gradients():
  rng = np.random.default_rng(3)
  g_rl = rng.standard_normal(40)
  g_mtp = 0.4 * g_rl + rng.standard_normal(40)
  jac = 0.01 * rng.standard_normal((20000, 40))
  found = coefficient(jac @ g_rl, jac @ g_mtp, mask=np.ones(20000, np.float32))
  assert found == pytest.approx(g_rl @ g_mtp / (g_mtp @ g_mtp), abs=0.02)
  # and the gain of a step on a quadratic of curvature L is greatest at (1 - L eta) / (L eta) of it
  curvature, eta = 3.0, 0.02
  gain = lambda x: (eta * x * (1 - curvature * eta) * g_rl @ g_mtp
                    - curvature * (eta * x) ** 2 * g_mtp @ g_mtp / 2)
  best = (1 - curvature * eta) / (curvature * eta) * found
  assert gain(best) > max(gain(best + x) for x in (-1.0, 1.0))


# ---- A policy with heads, small enough to read

def forward(params, batch, wants, copies=False):
  """Logits of t: row of w of the token before.

  Head k: row of w of the token k + 1 back, and row of head of the one before.
  """
  pad = lambda x, by: jnp.pad(x[:, :T - by], ((0, 0), (by, 0)) + ((0, 0),) * (x.ndim - 2))
  time, found = jnp.arange(T), {}

  def one(want):
    if want.kind in ('logp', 'entropy') or copies:
      logits, known = pad(params['w'][batch.tokens], 1), time > 0
    else:
      w = jax.lax.stop_gradient(params['w']) if 'trunk' in want.detach else params['w']
      logits, known = (pad(w[batch.tokens], want.size + 1) + pad(params['head'][batch.tokens], 1),
                       time > want.size)
    logp = jax.nn.log_softmax(logits)
    taken = jnp.take_along_axis(logp, batch.tokens[..., None], -1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    blank = lambda x: jnp.where(known, x, 0)
    return {'logp': blank(taken), 'mtp': blank(taken), 'entropy': blank(entropy),
            'draft': (blank(jnp.ones((N, T))[:len(taken)]),) * 3}[want.kind]

  for want in wants:
    found[want] = one(want)
  return found, Output(hidden=params['w'])


def batch_of(method, temperature=1.0):
  rng = np.random.default_rng(0)
  tokens, mask = (rng.integers(0, V, (N, T)).astype(np.int32),
                  (rng.random((N, T)) < 0.7).astype(np.float32))
  mask[:, :1] = 0
  empty = Batch(tokens, None, None, {}, {}, {}, {}, temperature, 0)
  there = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), PARAMS)
  old = {}
  for n in (n for t in method.terms for n in t.needs if not isinstance(n, Want)):
    old[label(n)] = np.asarray(forward(there, empty, (n.want,))[0][n.want]) * mask
  ones = np.ones((N, T), np.int32)
  return Batch(
      tokens=tokens, positions=ones, segments=ones, masks={'train': mask},
      weights={t.name: t.aggregate(mask).astype(np.float32) for t in method.terms},
      coef={t.name: np.float32(0 if callable(t.coef) else t.coef) for t in method.terms}, data=old,
      temperature=np.float32(temperature), use=np.int32(0),
      advantage=rng.standard_normal((N, T)).astype(np.float32) * mask)


def gradient(method, microbatches=1, forward=forward, batch=None):
  """(gradient, metrics) of a step with these terms."""
  method = ready(method)
  step = step_lib.make_gradient(step_lib.make_loss(forward, method.terms), SPECS, microbatches)
  return jax.jit(step)(PARAMS, batch_of(method) if batch is None else batch)


def close(a, b, atol=3e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), a, b)


# The estimator does not matter here: advantages are given.
POLICY = pieces.policy
BASE = compose(pieces.centred_advantage(), POLICY())


@pytest.mark.parametrize('options', [
    {}, {'ratio': 'sequence', 'clip_low': 0.1},
    {'aggregate': 'token_mean', 'clip_high': 0.28, 'dual_clip': 3.0},
    {'aggregate': 'constant'}, {'old': 'own'}, {'old': 'sampler'}])
def test_beside_any_policy_loss_and_an_entropy_bonus_it_adds_its_share_as_a_constant(options):
  bonus = pieces.entropy(coef=0.1)
  plain, _ = gradient(compose(BASE, bonus))
  grads, metrics = gradient(compose(BASE, occ(**options), bonus))
  factor = float(metrics['mtp_occ/lambda1'])
  assert abs(factor) > 1e-3
  alone, _ = gradient(mtp_methods.mtp_policy(1, max_tokens=T, coef=factor, **options))
  own, _ = gradient(mtp_methods.mtp_detach(1))
  close(grads, jax.tree.map(lambda *x: sum(x), plain, alone, own))
  assert np.abs(alone['head']).max() > 1e-4 and np.abs(alone['w']).max() > 1e-4


@pytest.mark.parametrize('average', ['sums', 'ratios'])
@pytest.mark.parametrize('microbatches', [2, 8])
def test_microbatches_change_nothing(microbatches, average):
  method = compose(BASE, occ(mtp_depth=2, average=average), pieces.entropy())
  close(gradient(method, microbatches), gradient(method))


def test_eight_devices_find_the_same_coefficient():
  method = ready(compose(BASE, occ(mtp_depth=2)))
  batch = batch_of(method)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  put = lambda x: jax.device_put(
      x, NamedSharding(mesh, PartitionSpec('data') if np.ndim(x) else PartitionSpec()))
  close(gradient(method, batch=jax.tree.map(put, batch)), gradient(method))


def as_first(k):
  """The policy with head k in the place of the first."""
  def seen(params, batch, wants):
    meant = {w: dataclasses.replace(w, size=k * (w.size > 0)) for w in wants}
    found, output = forward(params, batch, tuple(meant.values()))
    return {w: found[other] for w, other in meant.items()}, output
  return seen


def test_several_heads_have_a_coefficient_each_and_their_mean_is_the_loss():
  grads, metrics = gradient(occ(mtp_depth=2, train=0.0))
  heads = [mtp(1), mtp(2)]
  expected = jax.tree.map(jnp.zeros_like, grads)
  for head in heads:
    factor = float(metrics[f'mtp_occ/lambda{head.size}'])
    one, _ = gradient(mtp_methods.mtp_policy(1, coef=factor / 2), forward=as_first(head.size))
    expected = jax.tree.map(jnp.add, expected, one)
  close(grads, expected)
  assert metrics['mtp_occ/lambda1'] != metrics['mtp_occ/lambda2']


def test_a_head_that_copies_the_model_doubles_its_gradient():
  copying = functools.partial(forward, copies=True)
  plain, _ = gradient(BASE, forward=copying)
  double, _ = gradient(compose(BASE, mtp_methods.mtp_policy(1, coef=1.0)), forward=copying)
  np.testing.assert_allclose(double['w'], 2 * plain['w'], rtol=1e-6)


def test_likelihood_is_minus_the_mean_over_heads_and_detach_keeps_it_from_the_model():
  method = mtp_methods.measured(ready(mtp_methods.mtp_ce(2, coef=0.5)))
  step = step_lib.make_gradient(step_lib.make_loss(forward, method.terms), SPECS)
  batch = batch_of(method)
  grads, metrics = jax.jit(step)(PARAMS, batch)
  scores, _ = forward(PARAMS, batch, (mtp(1), mtp(2)))
  mask = batch.masks['train']
  expected = [-float((mask * scores[mtp(k)]).sum() / mask.sum()) for k in (1, 2)]
  np.testing.assert_allclose([metrics['mtp/loss1'], metrics['mtp/loss2']], expected, rtol=1e-5)
  np.testing.assert_allclose(metrics['mtp_ce'], np.mean(expected), rtol=1e-5)
  np.testing.assert_allclose(metrics['loss'], 0.5 * np.mean(expected), rtol=1e-5)
  cut, _ = gradient(mtp_methods.mtp_detach(2, coef=0.5))
  assert np.any(grads['w']) and not np.any(cut['w'])
  close(cut['head'], grads['head'])


# ---- The model itself

CFG = ModelConfig(vocab_size=V, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, ffw_dim=16,
                  mtp=MTP(depth=1))


@functools.cache
def model_gradient(*names):
  method = ready(compose(BASE, *(METHODS[name] for name in names)))
  step = step_lib.make_gradient(
      step_lib.make_loss(engine.make_forward(CFG), method.terms), model.specs(CFG))
  return jax.jit(step)(model.init(jax.random.key(0), CFG), batch_of(method))[0]


METHODS = {'detach': mtp_methods.mtp_detach(1), 'off': occ(plus=0.0),
           'silent': occ(plus=0.0, train=0.0), 'ce': mtp_methods.mtp_ce(1)}


@pytest.mark.parametrize('names', [('detach',), ('off',), ('silent',), ('detach', 'silent')])
def test_at_its_limits_the_model_learns_bit_for_bit_as_without_and_the_heads_by_themselves(names):
  plain, detach, grads = model_gradient(), model_gradient('detach'), model_gradient(*names)
  for name, x in param.flat(plain).items():
    if not name.startswith('mtp/'):
      np.testing.assert_array_equal(x, param.flat(grads)[name], err_msg=name)
  assert all(np.any(x) for x in jax.tree.leaves(detach['mtp']))
  close(grads['mtp'], jax.tree.map(lambda x: x * (names != ('silent',)), detach['mtp']))
  assert np.any(model_gradient('ce')['embed']['table'] != plain['embed']['table'])


def test_heads_are_trained_by_one_method_only():
  with pytest.raises(ValueError, match='two terms of one name'):
    methods.build(('grpo', 'mtp_detach', 'mtp_occ'), {}, max_tokens=4, mtp_depth=1)
  methods.build(('grpo', 'mtp_detach', 'mtp_occ'), {'mtp_occ': {'train': 0.0}}, max_tokens=4,
                mtp_depth=1)


# ---- Settings

@pytest.mark.parametrize('name, options, message', [
    ('mtp_ce', {}, 'the model has no heads'), ('mtp_occ', {'average': 'x'}, "unknown average 'x'"),
    ('mtp_occ', {'clip': -1.0}, 'clip is -1.0'), ('mtp_occ', {'train': -1.0}, 'train is -1.0'),
    ('mtp_policy', {'old': 'x'}, "unknown old 'x'"),
    ('mtp_ce', {'detach': ('x',)}, 'detach names')])
def test_what_makes_no_sense_is_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    methods.build((name,), {name: options}, max_tokens=4, mtp_depth=int(bool(options)))


def test_every_recipe_takes_a_regime_beside_it():
  for recipe in ('grpo', 'dr_grpo', 'rloo', 'dapo'):
    for regime in ('mtp_detach', 'mtp_ce', 'mtp_policy', 'mtp_occ'):
      built = methods.build((recipe, regime), {}, max_tokens=4, mtp_depth=2)
      assert built.terms[-1].name == regime
      assert {n.size for n in built.terms[-1].needs
              if isinstance(n, Want) and n.kind == 'mtp'} == {1, 2}
