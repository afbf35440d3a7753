"""Routes from the sampler to the train step: what is recorded, what replay gives, and how often routers differ."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import train_runs
from launch import engine, rollout
from launch import mesh as mesh_lib
from launch import step as step_lib
from nn import model, param
from nn.config import ModelConfig, MoE
from nn.types import LOGP
from rl import methods, sample
from rl.types import POLICY, Record

pytestmark = pytest.mark.usefixtures('cheap_compilation')

CFG = ModelConfig(
    vocab_size=37, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, ffw_dim=24,
    head=('attention',), pattern=(('attention', 'moe'),), repeats=2, tail=(('attention', 'moe'),),
    moe=MoE(experts=8, top_k=2, ffw_dim=8, bias_rate=0.01), max_length=32)
LAYERS = {1, 2, 3}
PROMPTS = [[3, 1, 4, 1], [5], [9, 2, 6, 5, 3, 5], [8, 9]]
GROUP, WIDTH, MAX_TOKENS = 4, 6, 8
METHOD = methods.build(('grpo',), {'grpo': {'beta': 0.0}})


@functools.cache
def params():
  return jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0), CFG))


@functools.cache
def moved():
  """The same with other routers: what an update does, and rounding elsewhere, in large."""
  noise = lambda x: 0.15 * jax.random.normal(jax.random.key(1), x.shape)
  return jax.tree_util.tree_map_with_path(
      lambda path, x: x + noise(x) if 'router' in str(path) else x, params())


def one_device():
  return mesh_lib.make_mesh({'data': 1})


def collected(replay, scored=params, parts=2):
  """A rollout batch; OLD is of the parameters `scored`, unless it is all of one step."""
  mesh = one_device()
  draw = engine.make_sample(CFG, mesh, WIDTH, record=True)
  score = engine.make_score(CFG, mesh, 8, replay)
  made = rollout.Engine(
      lambda source, prompts, group, sampling, key: draw(
          params(), prompts, group, sample.Sampling(MAX_TOKENS, eos=tuple(range(5))), key),
      None, lambda source, *rest: score(scored(), *rest))

  def answer(record, engine, key):
    rows = engine.sample(POLICY, PROMPTS, GROUP, {}, key)
    where = np.arange(rows.tokens.shape[1])
    mask = (where >= rows.start[:, None]) & (where < rows.end[:, None])
    return dataclasses.replace(
        record, rows=rows, masks={'train': mask.astype(np.float32)},
        reward={'task': rows.tokens.sum(1) % 3.0})

  task = rollout.Task(lambda record: record, answer)
  return rollout.collect(METHOD, made, task, Record(3, {}), len(PROMPTS) * GROUP, jax.random.key(2),
                         refills=0, once=parts == 1)


def batch_of(record):
  return rollout.minibatch(METHOD, record, np.arange(len(record.rows.start)), 0)


@functools.partial(jax.jit, static_argnums=0)
def forward(replay, params, batch):
  scores, output = engine.make_forward(CFG, replay)(params, batch, (LOGP,))
  return scores[LOGP], output


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient(replay, microbatches, params, batch):
  loss = step_lib.make_loss(engine.make_forward(CFG, replay), METHOD.terms)
  return step_lib.make_gradient(loss, model.specs(CFG), microbatches)(params, batch)


def known(batch):
  """Positions that the sampler read: all of a row but its last, [n, T]."""
  return np.arange(batch.tokens.shape[1]) < batch.segments.sum(1, keepdims=True) - 1


def test_recorded_are_the_experts_that_the_forward_pass_takes():
  """Ragged prompts padded on the left, groups, rows that end early."""
  record = collected(False)
  rows, batch = record.rows, batch_of(record)
  assert len(set(rows.end - rows.start)) > 2 and rows.routes.keys() == LAYERS
  logp, output = forward(False, params(), batch)
  for i in LAYERS:
    assert rows.routes[i].dtype == np.int8
    np.testing.assert_array_equal(
        rows.routes[i], np.where(known(batch)[..., None], output.routes[i], -1))
  np.testing.assert_allclose(logp * batch.masks['train'], rows.logp, atol=2e-5)


def test_many_experts_are_recorded_in_more_bits_and_dense_models_record_nothing():
  for experts, dtype in ((128, np.int8), (129, np.int16)):
    cfg = dataclasses.replace(CFG, moe=MoE(experts=experts, top_k=2, ffw_dim=8))
    decoder, specs = engine.make_decoder(cfg, record=True), param.abstract(model.specs(cfg))
    tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    extras = jax.eval_shape(lambda p, t: decoder.prefill(p, t, t[:, 0], 5)[2], specs, tokens)
    assert {x.dtype for x in extras.values()} == {np.dtype(dtype)}
  dense = dataclasses.replace(CFG, pattern=('attention',), tail=(), moe=MoE())
  draw = engine.make_sample(dense, one_device(), 6, record=True)
  rows = draw(model.init(jax.random.key(0), dense), PROMPTS, 1, sample.Sampling(2), jax.random.key(0))
  assert rows.routes is None


def test_replay_takes_the_recorded_experts_bit_for_bit_and_chooses_elsewhere():
  batch = batch_of(collected(True))
  _, free = forward(False, moved(), batch)
  _, bound = forward(True, moved(), batch)
  for i in LAYERS:
    assert (free.routes[i] != batch.routes[i])[known(batch)].any()
    np.testing.assert_array_equal(
        bound.routes[i], np.where(known(batch)[..., None], batch.routes[i], bound.own_routes[i]))
    counts = np.bincount(bound.routes[i][batch.segments > 0].ravel(), minlength=8)
    np.testing.assert_array_equal(bound.load[i], counts)


def test_replay_narrows_the_gap_between_sampler_and_trainer():
  gap = {r: rollout.parity(collected(r, scored=moved))['parity/mean'] for r in (False, True)}
  assert gap[True] < 0.5 * gap[False], gap
  with_own = {r: rollout.parity(collected(r))['parity/max'] for r in (False, True)}
  assert max(with_own.values()) < 2e-5


def test_replay_of_its_own_choice_changes_nothing():
  batch = batch_of(collected(False))
  free, bound = (gradient(r, 1, params(), batch) for r in (False, True))
  jax.tree.map(np.testing.assert_array_equal, bound, free)
  assert free[1]['routes/mismatch'] == 0 and np.abs(free[1]['loss']) > 0


@pytest.mark.parametrize('replay', [False, True])
def test_mismatch_is_the_share_of_trained_tokens_and_layers_whose_experts_differ(replay):
  record = collected(replay)
  batch = batch_of(record)
  _, output = forward(replay, moved(), batch)
  counted = known(batch) & (batch.masks['train'] > 0)
  differ = [np.sort(output.own_routes[i])[counted] != np.sort(batch.routes[i])[counted] for i in LAYERS]
  expected = np.mean([d.any(-1) for d in differ])
  assert 0.05 < expected < 0.95
  for microbatches in (1, 4):
    metrics = gradient(replay, microbatches, moved(), batch)[1]
    np.testing.assert_allclose(metrics['routes/mismatch'], expected, rtol=1e-6)
    assert 'routes/weight' not in metrics


def test_minibatches_uses_and_microbatches_replay_the_same():
  record = collected(True)
  known_of = lambda b: np.where(known(b)[..., None], True, False)
  steps = list(rollout.minibatches(METHOD, record, 2, 2, 0))
  assert len(steps) == 4
  for batch in steps:
    _, output = forward(True, moved(), batch)
    for i in LAYERS:
      np.testing.assert_array_equal(output.routes[i][known(batch)], batch.routes[i][known(batch)])
    one, four = (gradient(True, m, moved(), batch) for m in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, four)
  assert known_of(steps[0]).any()


def test_routers_learn_under_replay():
  batch = batch_of(collected(True))
  grads = param.flat(gradient(True, 1, params(), batch)[0])
  for name in ('blocks/0/ffn/router', 'tail/0/ffn/router'):
    assert np.abs(grads[name]).max() > 1e-6


def test_experts_over_eight_devices_replay_alike():
  batch = batch_of(collected(True))
  one = gradient(True, 1, moved(), batch), forward(True, moved(), batch)[1].routes
  mesh = jax.make_mesh((2, 4), ('data', 'expert'), axis_types=(AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    given = jax.device_put(moved(), param.shardings(model.specs(CFG), mesh, dict(CFG.rules)))
    rows = mesh_lib.put_global(batch, mesh)
    many = gradient(True, 1, given, rows), forward(True, given, rows)[1].routes
    draw = engine.make_sample(CFG, mesh, WIDTH, record=True)
    sampled = draw(given, PROMPTS, GROUP, sample.Sampling(4), jax.random.key(2)).routes
  jax.tree.map(np.testing.assert_array_equal, many[1], one[1])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), many[0], one[0])
  alone = engine.make_sample(CFG, one_device(), WIDTH, record=True)
  jax.tree.map(np.testing.assert_array_equal, sampled,
               alone(moved(), PROMPTS, GROUP, sample.Sampling(4), jax.random.key(2)).routes)


def test_a_run_with_replay_logs_no_mismatch_and_resumes_bit_for_bit(tmp_path):
  options = ('phases=rl', 'model.ffn=moe', 'model.moe.experts=4', 'model.moe.bias_rate=0.01',
             'rl.routing_replay=true', 'rl.steps=2', 'rl.uses=2', 'rl.microbatches=2',
             'checkpoint.every=1')
  whole = tmp_path / 'whole'
  assert train_runs.run(whole, *options) == 0
  lines = train_runs.logged(whole)
  assert len(lines) == 2
  for values in lines.values():
    # Of the first update of a step, whose weights are the sampler's.
    assert values['routes/mismatch'] == 0 and values['parity/max'] < 1e-4
  again = train_runs.rewound(whole, 1, tmp_path / 'again')
  assert train_runs.run(again, *options) == 0
  train_runs.assert_same_checkpoint(whole, again, 2)
