"""Multi-token prediction: what a head reads, what it is asked, where it sends gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import nn_tiny as tiny
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe import upcycle
from nn import block, lora, model, mtp, norm, param, score
from nn.config import GDN, MTP, LoRA, ModelConfig, MoE
from nn.types import DETACH, LOGP, draft
from nn.types import mtp as want

STACKS = {
    'attention': {},
    'gdn': dict(head=(), pattern=('gdn',), gdn=GDN(variant='gdn')),
    'moe': dict(ffn='moe', moe=MoE(experts=4, top_k=2, ffw_dim=8, bias_rate=0.1)),
}


def config(stack='attention', depth=2, **changes):
  settings = {'repeats': 1, 'mtp': MTP(depth=depth)} | STACKS[stack] | changes
  return tiny.config(**settings)


def weights_of(shape):
  return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 3))
def scores(params, cfg, rows, wants):
  output = model.forward(
      params, cfg, rows.tokens, rows.positions, rows.segments, heads=mtp.wanted(wants, cfg))
  return score.score(params, cfg, output, rows, wants)


@functools.partial(jax.jit, static_argnums=(1, 4))
def loss_and_grad(params, cfg, rows, weights, wants):
  """Sum over wants of weights [wants, B, T] * value, and its gradient."""
  def loss(params):
    found = scores(params, cfg, rows, wants)
    return sum(jnp.sum(w * found[n]) for w, n in zip(weights, wants, strict=True))
  return jax.value_and_grad(loss)(params)


def assert_close(actual, expected, rtol=2e-5):
  flat = param.flat(actual)
  for name, e in param.flat(expected).items():
    atol = rtol * max(np.abs(e).max(), 1e-6)
    np.testing.assert_allclose(flat[name], e, rtol=0, atol=atol, err_msg=name)


def as_in_the_paper(params, cfg, tokens, in_front, behind):
  """Log-probabilities by the indices of arXiv:2412.19437.

  h^k_i, i = 0 to T - k - 1, predicts t_{i + k + 1}.

  Args:
    tokens: [T].
    in_front, behind: [T, D], the model's hidden states in front of and behind its last norm.
  """
  emb, found = params['embed']['table'][tokens], []
  for k in range(1, cfg.mtp.depth + 1):
    p, before = params['mtp'][str(k - 1)], behind if cfg.mtp.hidden == 'after' else in_front
    count = len(tokens) - k
    two = {'hidden': norm.apply(p['hidden_norm'], cfg, before[:count]),
           'embedding': norm.apply(p['embedding_norm'], cfg, emb[k:])}
    x = jnp.concatenate([two[name] for name in cfg.mtp.order], -1) @ p['project']
    ones = jnp.ones((1, count), jnp.int32)
    in_front = block.apply(p, cfg, cfg.mtp_layer, x[None], jnp.arange(count)[None], ones)[0][0]
    behind = norm.apply(p['norm'], cfg, in_front)
    logp = jax.nn.log_softmax(model.unembed(params, cfg, behind))
    found.append([logp[i, tokens[i + k + 1]] for i in range(count - 1)])
  return found


@pytest.mark.parametrize('order, hidden', [
    (('hidden', 'embedding'), 'before'), (('embedding', 'hidden'), 'after')])
def test_heads_are_those_of_the_paper(order, hidden):
  cfg = config(tied=False, mtp=MTP(depth=2, order=order, hidden=hidden))
  params = tiny.params(cfg)
  rows = tiny.batch(tiny.tokens(1, 9))
  behind = tiny.forward(params, cfg, rows).hidden[0]
  # What is in front of the last norm is behind it in a model whose last norm is taken apart.
  layers, x = cfg.layers, params['embed']['table'][rows.tokens]
  for i, (place, lead) in enumerate(model.places(cfg)):
    part, name = place.split('/')
    p = jax.tree.map(lambda a, lead=lead: a[lead], params[part][name])
    x = block.apply(p, cfg, layers[i], x, rows.positions, rows.segments)[0]
  expected = as_in_the_paper(params, cfg, rows.tokens[0], x[0], behind)
  found = scores(params, cfg, rows, (want(1), want(2)))
  for k in (1, 2):
    np.testing.assert_allclose(found[want(k)][0, k + 1:], expected[k - 1], atol=3e-5)
    np.testing.assert_array_equal(found[want(k)][0, :k + 1], 0)


def test_a_head_that_only_hands_on_says_what_the_model_says_of_one_token_less():
  cfg = config(depth=1)
  params = tiny.params(cfg)
  p, eye = params['mtp']['0'], jnp.eye(16)
  ones = {name: {'scale': jnp.ones(16)} for name in ('hidden_norm', 'norm')}
  params['mtp']['0'] = p | ones | {
      'project': jnp.concatenate([eye, 0 * eye]), 'mixer': p['mixer'] | {'o': 0 * p['mixer']['o']},
      'ffn': p['ffn'] | {'down': 0 * p['ffn']['down']}}
  rows = tiny.batch(tiny.tokens(2, 8))
  hidden = tiny.forward(params, cfg, rows).hidden
  hidden = norm.rms_norm(norm.rms_norm(hidden, jnp.ones(16), 1e-6), jnp.ones(16), 1e-6)
  logp = jax.nn.log_softmax(model.unembed(params, cfg, hidden))
  expected = jnp.take_along_axis(logp[:, :-2], rows.tokens[:, 2:, None], -1)[..., 0]
  found = scores(params, cfg, rows, (want(1),))[want(1)]
  np.testing.assert_allclose(found[:, 2:], expected, atol=1e-5)
  swapped = dataclasses.replace(cfg, mtp=MTP(depth=1, order=('embedding', 'hidden')))
  assert np.abs(scores(params, swapped, rows, (want(1),))[want(1)][:, 2:] - expected).max() > 0.1


@pytest.mark.parametrize('stack', STACKS)
def test_packed_documents_are_separate_ones(stack):
  cfg = config(stack)
  params, wants = tiny.params(cfg), (want(1), want(2))
  cuts = (0, 6, 8, 9, 15)               # one of two tokens and one of one, too short for heads
  tokens, weights = tiny.tokens(1, 15), weights_of((2, 1, 15))
  segments = np.searchsorted(cuts, np.arange(15), side='right')
  packed = loss_and_grad(params, cfg, tiny.batch(tokens, segments[None]), weights, wants)
  apart, apart_weights = np.zeros((4, 6), int), np.zeros((2, 4, 6), np.float32)
  for n, (a, b) in enumerate(zip(cuts, cuts[1:])):
    apart[n, :b - a], apart_weights[:, n, :b - a] = tokens[0, a:b], weights[:, 0, a:b]
  real = np.arange(6) < np.diff(cuts)[:, None]
  separate = loss_and_grad(params, cfg, tiny.batch(apart, real), jnp.asarray(apart_weights), wants)
  np.testing.assert_allclose(packed[0], separate[0], rtol=1e-5)
  assert_close(packed[1], separate[1])
  assert np.abs(packed[1]['mtp']['1']['project']).max() > 0


def test_the_gradient_splits_into_what_goes_through_trunk_embedding_and_head():
  cfg = config()
  params, rows = tiny.params(cfg), tiny.batch(tiny.tokens(2, 8))
  weights = weights_of((2, 2, 8))
  gradient = lambda detach: loss_and_grad(
      params, cfg, rows, weights, (want(1, detach), want(2, detach)))[1]
  whole, nothing = gradient(()), gradient(DETACH)
  alone = {kept: gradient(tuple(x for x in DETACH if x != kept)) for kept in DETACH}
  shared = lambda grads: {name: part for name, part in grads.items() if name != 'mtp'}
  assert_close(jax.tree.map(lambda *x: sum(x), *(shared(g) for g in alone.values())), shared(whole))
  assert not any(np.any(x) for x in jax.tree.leaves(shared(nothing)))
  for grads in (whole, nothing):        # of the heads' own parameters there is one gradient
    assert_close(grads['mtp'], alone['trunk']['mtp'])
  for kept, grads in alone.items():
    reached = {name for name, part in shared(grads).items()
               if any(np.any(x) for x in jax.tree.leaves(part))}
    assert reached == ({'embed'} if kept != 'trunk' else {'embed', 'head', 'blocks', 'norm'}), kept


def test_two_ways_of_cutting_off_live_side_by_side():
  cfg, rows = config('moe', depth=1), tiny.batch(tiny.tokens(2, 8))
  params, weights = tiny.params(cfg), weights_of((2, 2, 8))
  both = loss_and_grad(params, cfg, rows, weights, (want(1), want(1, DETACH)))
  one = loss_and_grad(params, cfg, rows, weights[:1], (want(1),))
  other = loss_and_grad(params, cfg, rows, weights[1:], (want(1, DETACH),))
  assert_close(both[1], jax.tree.map(jnp.add, one[1], other[1]))


def test_drafts_by_hand():
  cfg, rows = config(depth=1), tiny.batch(tiny.tokens(2, 30))
  params = tiny.params(cfg)
  output = jax.jit(lambda: model.forward(
      params, cfg, rows.tokens, rows.positions, rows.segments, heads={(): 1}))()
  best = lambda hidden: np.asarray(model.unembed(params, cfg, hidden)).argmax(-1)[:, :-1]
  ahead, main = best(output.mtp_hidden[()][0]), best(output.hidden)
  known, right, agrees = scores(params, cfg, rows, (draft(1),))[draft(1)]
  np.testing.assert_array_equal(known, np.arange(30) >= 2 + 0 * rows.tokens)
  np.testing.assert_array_equal(right[:, 2:], (ahead == rows.tokens[:, 1:])[:, 1:])
  np.testing.assert_array_equal(agrees[:, 2:], (ahead == main)[:, 1:])
  assert not right[:, :2].any() and not agrees[:, :2].any() and agrees.any()


def test_eight_devices_compute_what_one_does():
  cfg = config('moe', num_kv_heads=4)
  params, rows, weights = tiny.params(cfg), tiny.batch(tiny.tokens(8, 8)), weights_of((2, 8, 8))
  wants = (want(1), want(2))
  expected = loss_and_grad(params, cfg, rows, weights, wants)
  mesh = jax.make_mesh((2, 2, 2), ('fsdp', 'expert', 'model'), axis_types=(AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    split = jax.device_put(params, param.shardings(model.specs(cfg), mesh, dict(cfg.rules)))
    by_row = NamedSharding(mesh, PartitionSpec(('fsdp', 'expert')))
    rows = jax.tree.map(lambda x: jax.device_put(x, by_row) if x.ndim else x, rows)
    actual = loss_and_grad(split, cfg, rows, weights, wants)
  np.testing.assert_allclose(actual[0], expected[0], rtol=2e-5)
  assert_close(actual[1], expected[1], 5e-5)


def test_layout_and_recomputation_change_nothing():
  changes = dict(remat='full', unroll=True, score_chunk=3)
  cfg, rows, weights = config(), tiny.batch(tiny.tokens(2, 8)), weights_of((2, 2, 8))
  params, wants = tiny.params(cfg), (want(1), LOGP)
  expected = loss_and_grad(params, cfg, rows, weights, wants)
  actual = loss_and_grad(params, dataclasses.replace(cfg, **changes), rows, weights, wants)
  np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
  assert_close(actual[1], expected[1])


def test_half_precision_is_near():
  cfg, rows = config(), tiny.batch(tiny.tokens(2, 8))
  params = jax.tree.map(lambda a: 0.5 * a, tiny.params(cfg))
  half = scores(params, dataclasses.replace(cfg, dtype='bfloat16'), rows, (want(2),))[want(2)]
  np.testing.assert_allclose(half, scores(params, cfg, rows, (want(2),))[want(2)], atol=0.2)


def test_heads_that_nobody_asks_cost_nothing():
  cfg, rows = config(), tiny.batch(tiny.tokens(2, 8))
  without = dataclasses.replace(cfg, mtp=MTP())
  params = tiny.params(cfg)
  assert model.specs(cfg).keys() - model.specs(without).keys() == {'mtp'}
  bare = {name: part for name, part in params.items() if name != 'mtp'}
  np.testing.assert_array_equal(
      tiny.forward(bare, cfg, rows).hidden, tiny.forward(bare, without, rows).hidden)
  assert 'mtp' not in model.prepare(params, cfg)
  with pytest.raises(
      ValueError, match='3 heads of multi-token prediction are asked for and the model has 2'):
    mtp.wanted((want(3),), cfg)


def test_experts_of_heads_are_layers_behind_the_last():
  cfg, rows = config('moe'), tiny.batch(tiny.tokens(2, 8))
  params, specs = tiny.params(cfg), model.specs(cfg)
  output = jax.jit(lambda p: model.forward(
      p, cfg, rows.tokens, rows.positions, rows.segments, heads={(): 2}))(params)
  assert output.load.keys() == {0, 1, 2, 3}
  assert [int(output.load[i].sum()) for i in (1, 2, 3)] == [2 * 2 * 8, 2 * 2 * 7, 2 * 2 * 6]
  moved = model.after_update(params, cfg, output.load)['mtp']['1']['ffn']['bias']
  assert np.any(moved != params['mtp']['1']['ffn']['bias'])
  grown = upcycle.grow(params, specs, upcycle.select(specs, 2))
  assert grown['mtp']['0']['ffn']['gate'].shape[0] == 8
  assert grown['mtp']['0']['project'].shape == (32, 16)
  assert model.square_sums(params, cfg).keys() == {
      'embed', 'norm', *(f'layer {i}' for i in range(4))}


def test_adapters_of_heads_begin_as_nothing():
  cfg = config(lora=LoRA(rank=2, targets=('*/mixer/*', 'mtp/*/project')))
  names = lora.targets(model.specs(cfg), cfg.lora)
  assert {'mtp/0/project', 'mtp/1/mixer/q', 'blocks/0/mixer/q'} <= set(names)
  params, plain = model.init(jax.random.key(0), cfg), dataclasses.replace(cfg, lora=LoRA())
  rows = tiny.batch(tiny.tokens(2, 8))
  np.testing.assert_allclose(scores(params, cfg, rows, (want(2),))[want(2)],
                             scores(lora.base(params), plain, rows, (want(2),))[want(2)], atol=1e-6)


def test_flops_by_hand():
  cfg = ModelConfig(vocab_size=10, embed_dim=6, num_heads=4, num_kv_heads=2, head_dim=2, ffw_dim=5,
                    mtp=MTP(depth=2))
  layer = block.flops(cfg, cfg.mtp_layer, 20)
  more = model.flops(cfg, 20, depth=2) - model.flops(cfg, 20)
  assert more == 3 * 2 * (layer + 2 * 12 * 6 + 2 * 6 * 10)


@pytest.mark.parametrize('settings, message', [
    (dict(depth=-1), 'depth is -1'), (dict(hidden='before'), 'depth is 0: there are no heads'),
    (dict(depth=1, order=('hidden', 'hidden')), 'order is'),
    (dict(depth=1, hidden='x'), 'before or after'),
    (dict(depth=1, layer=('attention',)), 'a mixer and an FFN'),
    (dict(depth=1, layer=('nothing', 'mlp')), "unknown mixer 'nothing'")])
def test_settings_are_checked(settings, message):
  with pytest.raises(ValueError, match=message):
    model.specs(tiny.config(mtp=MTP(**settings)))
