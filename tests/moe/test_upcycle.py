"""Growing experts: what is copied, what the function becomes, whom to copy, how copies part.

And mixtures made of dense models.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from moe import layer, router, upcycle
from nn import model, param
from nn.config import MoE
from tests.moe import moe_tiny as tiny
from tests.nn import nn_tiny

# A layer that stands alone and two under the scan, each with four experts.
CFG = nn_tiny.config(head=(('attention', 'moe'),), pattern=(('attention', 'moe'),), moe=MoE(
    experts=4, top_k=2, ffw_dim=8, bias_rate=0.01, shared_dim=6))
LAYERS = ('head/0/ffn', 'blocks/0/ffn')


def scale(experts=4, top_k=2, **changes):
  """One layer by itself: config, parameters, and both as a table of one layer."""
  cfg = tiny.config(MoE(experts=experts, top_k=top_k, ffw_dim=12, **changes))
  return cfg, {'ffn': tiny.params(cfg)}, {'ffn': layer.specs(cfg)}


def wider(cfg, factor, **changes):
  return dataclasses.replace(
      cfg, moe=dataclasses.replace(upcycle.grown(cfg.moe, factor), **changes))


@functools.partial(jax.jit, static_argnums=1)
def run(params, cfg, x):
  return layer.apply(params['ffn'], cfg, x, jnp.ones(x.shape[:2], jnp.int32))


# ---- Shapes and counts

@pytest.mark.parametrize('factor', [1, 2, 3])
def test_originals_come_first_and_copies_are_their_sources_bit_for_bit(factor):
  specs, params = model.specs(CFG), tiny.draw(model.specs(CFG))
  score_of = {
      LAYERS[0]: np.array([1.0, 4.0, 2.0, 3.0]),
      LAYERS[1]: np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])}
  index = upcycle.select(specs, factor, score=score_of, cap=3)
  grown = param.flat(jax.jit(lambda tree: upcycle.grow(tree, specs, index))(params))
  after = param.flat(model.specs(wider(CFG, factor)))
  assert {name: a.shape for name, a in grown.items()} == {
      name: s.shape for name, s in after.items()}
  for name, a in param.flat(params).items():
    table = param.flat(specs)[name]
    if 'expert' not in table.axes:
      np.testing.assert_array_equal(grown[name], a)
      continue
    for r, sources in enumerate(np.atleast_2d(index[upcycle.layer_of(name)])):
      one, many = (
          np.asarray(x)[r] if 'layers' in table.axes else np.asarray(x) for x in (a, grown[name]))
      axis = table.axes.index('expert') - ('layers' in table.axes)
      np.testing.assert_array_equal(sources[:4], range(4))
      for i, e in enumerate(sources):
        np.testing.assert_array_equal(many.take(i, axis), one.take(e, axis), err_msg=name)
  if factor == 2:
    np.testing.assert_array_equal(index[LAYERS[1]][:, 4:], [[0, 0, 0, 1], [3, 3, 3, 2]])


def test_greedy_counts():
  counts = np.bincount(
      upcycle.greedy(np.random.default_rng(0).permutation(32), 32, 3), minlength=32)
  assert sorted(counts)[::-1][:12] == [3] * 10 + [2, 0]
  # Cap 1 is uniform; when all have their copies it goes round a second time.
  np.testing.assert_array_equal(np.bincount(upcycle.greedy(np.arange(5), 15, 1)), 3)
  np.testing.assert_array_equal(np.bincount(upcycle.greedy(np.arange(4), 12, 2)), [2, 2, 4, 4])
  np.testing.assert_array_equal(np.bincount(upcycle.uniform(4, 12)), 3)


def test_weighted_selection_follows_the_scores():
  score_of = np.array([1.0, 2.0, 3.0, 2.0])
  counts = np.bincount(upcycle.weighted(score_of, 40_000, 1.0, 0), minlength=4) / 40_000
  np.testing.assert_allclose(counts, np.exp(score_of / 2) / np.exp(score_of / 2).sum(), atol=0.01)
  np.testing.assert_array_equal(
      upcycle.weighted(score_of, 9, 1.0, 7), upcycle.weighted(score_of, 9, 1.0, 7))
  np.testing.assert_array_equal(upcycle.weighted(score_of, 9, 0.01, 7), 2)


def test_copies_stay_in_their_group():
  _, _, specs = scale(experts=6, groups=2)
  index = upcycle.select(
      specs, 2, score={'ffn': np.array([1.0, 2, 3, 9, 8, 7])}, cap=2, groups=2)['ffn']
  np.testing.assert_array_equal(index, [0, 1, 2, 2, 2, 1, 3, 4, 5, 3, 3, 4])
  np.testing.assert_array_equal(np.flatnonzero(upcycle.is_copy(index)), [3, 4, 5, 9, 10, 11])


def test_moments_follow_the_copies():
  specs, params = model.specs(CFG), tiny.draw(model.specs(CFG))
  index = upcycle.select(specs, 2)
  moments = param.split(jax.tree.map(np.square, params), specs)[0]
  grow = jax.jit(lambda tree: upcycle.grow(tree, specs, index))
  moved = jax.jit(
      lambda after, how: upcycle.grow_moments(moments, specs, index, how, params, after),
      static_argnums=1)
  after = grow(params)
  grown = {how: moved(after, how) for how in upcycle.OPTIMIZERS}
  jax.tree.map(np.testing.assert_array_equal, grown['copy'], grow(moments))
  for name in ('head/0/ffn/down', 'blocks/0/ffn/router'):
    axis = param.flat(specs)[name].axes.index('expert')
    halves = {
        how: np.split(np.asarray(param.flat(tree)[name]), 2, axis) for how, tree in grown.items()}
    for how, share in (('copy', 1), ('reset', 0), ('scale', 0.5)):
      np.testing.assert_array_equal(halves[how][0], halves['copy'][0])
      np.testing.assert_allclose(halves[how][1], share * halves['copy'][0], rtol=1e-6)
  # A copy that was moved by half its length keeps a quarter.
  after['head']['0']['ffn']['up'] = after['head']['0']['ffn']['up'].at[5].multiply(1.5)
  scaled = moved(after, 'scale')
  ratio = scaled['head']['0']['ffn']['up'] / grown['copy']['head']['0']['ffn']['up']
  np.testing.assert_allclose(ratio[:, 0, 0], [1, 1, 1, 1, 0.5, 0.25, 0.5, 0.5], rtol=1e-5)


def test_counters_of_copies_begin_at_zero():
  np.testing.assert_array_equal(
      upcycle.grow_load(jnp.array([5, 6, 7]), np.array([0, 1, 2, 2, 0, 2])), [5, 6, 7, 0, 0, 0])


def test_fresh_experts_are_those_that_a_run_of_the_seed_would_begin_with():
  specs, params = model.specs(CFG), tiny.draw(model.specs(CFG))
  # With two groups copies lie among originals.
  index, after = upcycle.select(specs, 2, groups=2), model.specs(wider(CFG, 2))
  renew = jax.jit(
      lambda tree, seed: upcycle.renew(upcycle.grow(tree, specs, index), after, index, seed))
  begin = jax.jit(lambda seed: param.init(jax.random.key(seed), after))
  fresh, begun, old = (param.flat(tree) for tree in (renew(params, 7), begin(7), params))
  for name, spec in param.flat(after).items():
    if 'expert' not in spec.axes:
      np.testing.assert_array_equal(fresh[name], old[name], err_msg=name)
      continue
    now, first, was = (
        np.moveaxis(np.asarray(tree[name]), spec.axes.index('expert'), 0)
        for tree in (fresh, begun, old))
    np.testing.assert_array_equal(now[[0, 1, 4, 5]], was, err_msg=name)
    np.testing.assert_allclose(
        now[[2, 3, 6, 7]], first[[2, 3, 6, 7]], rtol=1e-5, atol=1e-7, err_msg=name)
  other = param.flat(renew(params, 8))
  assert np.any(other['head/0/ffn/up'] != fresh['head/0/ffn/up'])
  np.testing.assert_array_equal(fresh['head/0/ffn/bias'][jnp.array([2, 3, 6, 7])], 0)


# ---- The function at the switch

@pytest.mark.parametrize(
    'scores, renormalise, factor', [('softmax', False, 2), ('sigmoid', True, 3)])
def test_routing_to_all_copies_is_the_source(scores, renormalise, factor):
  cfg, params, specs = scale(
      scores=scores, renormalise=renormalise, bias_rate=0.01 if scores == 'sigmoid' else 0.0)
  x, _ = tiny.rows()
  grown = upcycle.grow(params, specs, upcycle.select(specs, factor))
  same, _ = run(grown, wider(cfg, factor, top_k=2 * factor), x)
  np.testing.assert_allclose(same, run(params, cfg, x)[0], atol=2e-6)


def test_two_experts_of_doubled_ones_are_the_sources_best():
  cfg, params, specs = scale(scores='sigmoid', bias_rate=0.01)
  x, _ = tiny.rows()
  grown = upcycle.grow(params, specs, upcycle.select(specs, 2))
  y, extras = run(grown, wider(cfg, 2), x)
  best = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, top_k=1))
  np.testing.assert_allclose(y, run(params, best, x)[0], atol=2e-6)
  assert np.abs(y - run(params, cfg, x)[0]).max() > 0.1
  # Two, and not one twice; the flops grow by the router's new columns.
  np.testing.assert_array_equal(extras['routes'][..., 0] + 4, extras['routes'][..., 1])
  assert layer.flops(wider(cfg, 2), 1) - layer.flops(cfg, 1) == 2 * tiny.WIDTH * 4


# ---- Noise, and what it is for

@pytest.mark.parametrize('settings', [{}, {'bias_rate': 0.01}, {'bias': True}])
def test_noise_is_on_copies_only_absolute_and_of_the_seed(settings):
  """Without a selection bias, with one that moves, with one that is fixed."""
  cfg, params, specs = scale(**settings)
  name = 'bias' if settings else 'router'
  if settings:
    # All equal: noise in proportion to their spread would be none.
    params['ffn']['bias'] = jnp.full(4, 0.3)
  index = upcycle.select(specs, 2)
  grown = upcycle.grow(params, specs, index)
  table = {'ffn': layer.specs(wider(cfg, 2))}
  perturb = jax.jit(lambda tree, seed: upcycle.perturb(tree, table, index, noise=1e-3, seed=seed))
  noisy, again, other = (perturb(grown, s) for s in (1, 1, 2))
  changed = {key for key in noisy['ffn'] if np.any(noisy['ffn'][key] != grown['ffn'][key])}
  assert changed == {name}
  np.testing.assert_array_equal(noisy['ffn'][name][..., :4], grown['ffn'][name][..., :4])
  step = np.asarray(noisy['ffn'][name] - grown['ffn'][name])[..., 4:]
  assert (step != 0).all()
  size = 1e-3 if settings else 0.01 * np.sqrt(np.mean(np.square(params['ffn']['router'])))
  np.testing.assert_allclose(np.sqrt(np.mean(step**2)), size, rtol=0.7 if settings else 0.3)
  np.testing.assert_array_equal(noisy['ffn'][name], again['ffn'][name])
  assert np.any(noisy['ffn'][name] != other['ffn'][name])


def train(params, cfg, steps=60):
  """Adam on a linear map of fresh tokens, with the selection bias as in a run.

  Returns the parameters, and the loads of the end.
  """
  specs, tx = layer.specs(cfg), optax.adam(1e-2)
  target = jnp.asarray(
      np.random.default_rng(5).standard_normal((tiny.WIDTH, tiny.WIDTH)), jnp.float32)

  def step(carry, key):
    params, state = carry
    trainable, frozen = param.split(params, specs)
    x = jax.random.normal(key, (1, 128, tiny.WIDTH))

    def loss(trainable):
      y, extras = layer.apply(param.merge(trainable, frozen), cfg, x, jnp.ones((1, 128), jnp.int32))
      return jnp.mean(jnp.square(y - x @ target)), extras['load']

    grads, load = jax.grad(loss, has_aux=True)(trainable)
    updates, state = tx.update(grads, state)
    params = param.merge(optax.apply_updates(trainable, updates), frozen)
    return (layer.after_update(params, cfg, load), state), load

  @jax.jit
  def whole(params):
    keys = jax.random.split(jax.random.key(0), steps)
    (params, _), loads = jax.lax.scan(step, (params, tx.init(param.split(params, specs)[0])), keys)
    return params, loads

  params, loads = whole(params['ffn'])
  return {'ffn': params}, np.asarray(loads)


def test_copies_part_with_noise_and_never_without_and_loads_become_even():
  cfg, params, specs = scale(bias_rate=0.01)
  index, table = upcycle.select(specs, 2), {'ffn': layer.specs(wider(cfg, 2))}
  grown = upcycle.grow(params, specs, index)
  still = dataclasses.replace(
      cfg, moe=dataclasses.replace(upcycle.grown(cfg.moe, 2), bias_rate=0.0))
  same, _ = train({'ffn': {k: a for k, a in grown['ffn'].items() if k != 'bias'}}, still)
  for name in ('gate', 'up', 'down'):
    np.testing.assert_array_equal(same['ffn'][name][:4], same['ffn'][name][4:])

  noisy, loads = train(upcycle.perturb(grown, table, index), wider(cfg, 2), steps=300)
  assert (upcycle.similarity(noisy, table, index)['ffn'][4:] < 0.99).all()
  np.testing.assert_allclose(upcycle.similarity(grown, table, index)['ffn'], 1, rtol=1e-5)
  # Of the last 50 steps together: everyone near K / (m E), from a start where two of eight take
  # more than half.
  metrics = router.load_metrics(loads[-50:].sum(0))
  assert metrics['violation'] < 0.25 and metrics['idle'] == 0, metrics
  assert router.load_metrics(loads[0])['violation'] > 0.5


# ---- Whom to copy

def test_scores_by_hand():
  specs = model.specs(CFG)
  params, grads, second = (tiny.draw(specs, seed) for seed in range(3))
  squares = lambda tree, r, e: sum(
      (np.asarray(tree['blocks']['0']['ffn'][n], np.float64)[r, e] ** 2).sum()
      for n in ('gate', 'up'))
  hand = {
      'grad_sq': lambda w, g, v: g,
      'saliency': lambda w, g, v: np.sqrt(w * g),
      'weight': lambda w, g, v: np.sqrt(w),
      'fisher': lambda w, g, v: g / (np.sqrt(v) + 1e-8)}
  for kind, formula in hand.items():
    found = upcycle.scores(kind, specs, params, grads, second)
    assert {name: s.shape for name, s in found.items()} == {LAYERS[0]: (4,), LAYERS[1]: (2, 4)}
    for r in range(2):
      for e in range(4):
        want = formula(*(squares(tree, r, e) for tree in (params, grads, second)))
        np.testing.assert_allclose(found[LAYERS[1]][r, e], want, rtol=1e-5, err_msg=kind)
  found, other = (upcycle.scores('grad_sq', specs, params, tree) for tree in (grads, second))
  np.testing.assert_allclose(
      upcycle.average([found, other])[LAYERS[0]], (found[LAYERS[0]] + other[LAYERS[0]]) / 2)
  with_down = upcycle.scores('grad_sq', specs, params, grads, arrays=('gate', 'up', 'down'))
  down = np.square(grads['head']['0']['ffn']['down']).sum((1, 2))
  np.testing.assert_allclose(with_down[LAYERS[0]], found[LAYERS[0]] + down, rtol=1e-5)


def test_scores_are_the_same_on_any_mesh_and_follow_the_experts():
  cfg, params, specs = scale()
  x, segments = tiny.rows()
  gradients = lambda params: {'ffn': tiny.pull(params['ffn'], cfg, x, segments)[1][0]}
  found = upcycle.scores('grad_sq', specs, params, gradients(params))['ffn']
  mesh = jax.make_mesh((2, 4), ('data', 'expert'), axis_types=(AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, param.shardings(specs, mesh, dict(cfg.rules)))
    split = upcycle.scores('grad_sq', specs, placed, gradients(placed))['ffn']
  np.testing.assert_allclose(split, found, rtol=1e-4)
  order = np.array([2, 0, 3, 1])
  mixed = upcycle.grow(params, specs, {'ffn': order})
  np.testing.assert_allclose(
      upcycle.scores('grad_sq', specs, mixed, gradients(mixed))['ffn'], found[order], rtol=1e-4)


def test_growth_of_sharded_parameters_is_growth():
  specs, params = model.specs(CFG), tiny.draw(model.specs(CFG))
  index, after = upcycle.select(specs, 2), model.specs(wider(CFG, 2))
  mesh = jax.make_mesh((2, 4), ('data', 'expert'), axis_types=(AxisType.Auto,) * 2)
  def both(params):
    return upcycle.perturb(upcycle.grow(params, specs, index), after, index)
  with jax.set_mesh(mesh):
    rules = dict(CFG.rules)
    placed = jax.device_put(params, param.shardings(specs, mesh, rules))
    grown = jax.jit(both, out_shardings=param.shardings(after, mesh, rules))(placed)
  jax.tree.map(np.testing.assert_array_equal, grown, jax.jit(both)(params))
  assert {s.data.shape[1] for s in grown['blocks']['0']['ffn']['up'].addressable_shards} == {2}


@pytest.mark.parametrize('call, match', [
    (lambda specs: upcycle.select(specs, 0), 'factor is 0, wanted a whole number of at least 1'),
    (lambda specs: upcycle.select(specs, 2, allocation='fair'),
     "allocation is 'fair', wanted greedy or weighted"),
    (lambda specs: upcycle.select(specs, 2, cap=0), 'cap 0 must be at least 1'),
    (lambda specs: upcycle.select({'ffn': {}}, 2),
     'no experts to copy; a dense one is made a mixture'),
    (lambda specs: upcycle.scores('loss', specs, specs),
     "unknown scores 'loss'; known are grad_sq"),
    (lambda specs: upcycle.scores('fisher', specs, specs, specs),
     "'fisher' need gradients and second moments"),
    (lambda specs: upcycle.grow_moments({}, specs, {}, 'forget', {}, {}),
     "optimizer is 'forget', wanted one of copy"),
])
def test_what_cannot_be_meant_is_refused(call, match):
  with pytest.raises(ValueError, match=match):
    call(model.specs(CFG))


# ---- Dense to mixture

DENSE = dataclasses.replace(CFG, head=('attention',), pattern=('attention',), moe=MoE())
ALONE = dataclasses.replace(DENSE, repeats=0)          # the first layer only


def mixture(dense, **changes):
  return dataclasses.replace(
      dense, ffn='moe', moe=MoE(**(dict(experts=8, top_k=4, ffw_dim=24) | changes)))


def from_dense(params, dense, cfg, slices):
  make = lambda p: upcycle.from_dense(
      p, model.specs(dense), model.specs(cfg), cfg.moe, jax.random.key(3), slices)
  return jax.tree.map(np.asarray, jax.jit(make)(params))


@pytest.mark.parametrize('slices', [1, 2])
def test_a_mixture_of_a_dense_model_begins_as_that_model(slices):
  cfg = mixture(ALONE, ffw_dim=24 // slices, scale=slices, bias_rate=0.01)
  params, rows = tiny.draw(model.specs(ALONE)), nn_tiny.batch(nn_tiny.tokens(2, 9))
  out = nn_tiny.forward(from_dense(params, ALONE, cfg, slices), cfg, rows)
  np.testing.assert_allclose(out.hidden, nn_tiny.forward(params, ALONE, rows).hidden, atol=1e-5)
  # The router does choose.
  assert len({tuple(r) for r in np.asarray(out.routes[0]).reshape(-1, 4)}) > 1


def test_every_expert_of_every_layer_is_a_slice_of_its_layer():
  params = tiny.draw(model.specs(DENSE))
  cfg = mixture(DENSE, ffw_dim=8, scale=3, experts=9, top_k=3)
  sparse = from_dense(params, DENSE, cfg, 3)
  for old, new in ((params['head']['0'], sparse['head']['0']), *(
      jax.tree.map(lambda a, r=r: a[r], (params['blocks']['0'], sparse['blocks']['0']))
      for r in range(2))):
    for e in range(9):
      mine = slice(8 * (e % 3), 8 * (e % 3) + 8)
      np.testing.assert_array_equal(new['ffn']['up'][e], old['ffn']['up'][:, mine])
      np.testing.assert_array_equal(new['ffn']['gate'][e], old['ffn']['gate'][:, mine])
      np.testing.assert_array_equal(new['ffn']['down'][e], old['ffn']['down'][mine])
      np.testing.assert_array_equal(new['ffn']['router'][:, e], new['ffn']['router'][:, e - e % 3])
    jax.tree.map(np.testing.assert_array_equal, new['mixer'], old['mixer'])


@pytest.mark.parametrize('changes, slices, match', [
    (dict(renormalise=False), 1, 'kept only with gates that sum to 1'),
    (dict(ffw_dim=12), 2, 'renormalise=True, scale=2'),
    (dict(top_k=3, scale=2.0, ffw_dim=12), 2, 'must both be multiples of 2 slices'),
    (dict(shared_dim=4), 1, 'no shared expert'),
    (dict(ffw_dim=10), 1, 'all but the FFNs must be alike'),
])
def test_mixtures_that_could_not_begin_as_the_dense_model_are_refused(changes, slices, match):
  with pytest.raises(ValueError, match=match):
    from_dense(tiny.draw(model.specs(DENSE)), DENSE, mixture(DENSE, **changes), slices)
