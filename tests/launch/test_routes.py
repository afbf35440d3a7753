"""Routes from the sampler to the train step.

What is recorded, what replay gives, and how often routers differ.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_runs
from launch import engine, loop, rl_phase, rollout
from launch import mesh as mesh_lib
from launch import step as step_lib
from nn import model, param
from nn.config import ModelConfig, MoE
from nn.types import LOGP
from rl import methods, sample
from rl.types import POLICY, SAMPLER, Record, label

CFG = ModelConfig(
    vocab_size=37, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, ffw_dim=24,
    pattern=('attention', ('attention', 'moe')), tail=(('attention', 'moe'),),
    moe=MoE(experts=8, top_k=2, ffw_dim=8, bias_rate=0.01), max_length=32)
LAYERS = {1, 2}
PROMPTS = [[3, 1, 4, 1], [5], [9, 2, 6, 5, 3, 5], [8, 9]]
GROUP, WIDTH = 4, 6
SAMPLING = sample.Sampling(max_tokens=8, eos=tuple(range(5)))
METHOD = rl_phase.watched(methods.build(('grpo',), {'grpo': {'beta': 0.0}}))


@functools.cache
def params():
  return model.init(jax.random.key(0), CFG)


@functools.cache
def moved():
  """The same with other routers: what an update does, and rounding elsewhere, in large."""
  noise = lambda x: 0.05 * jax.random.normal(jax.random.key(1), x.shape)
  return jax.tree_util.tree_map_with_path(
      lambda path, x: x + noise(x) if 'router' in str(path) else x, params())


@functools.cache
def draw():
  return engine.make_sample(CFG, mesh_lib.make_mesh({'data': 1}), WIDTH, record=True)


@functools.cache
def collected(replay, scored=params):
  """A rollout batch whose OLD is of the parameters `scored`."""
  score = engine.make_score(CFG, mesh_lib.make_mesh({'data': 1}), 8, replay)
  made = rollout.Engine(
      lambda source, prompts, group, sampling, key: draw()(params(), prompts, group, SAMPLING, key),
      None, lambda source, *rest: score(scored(), *rest))

  def answer(record, engine, key):
    rows = engine.sample(POLICY, PROMPTS, GROUP, {}, key)
    where = np.arange(rows.tokens.shape[1])
    mask = (where >= rows.start[:, None]) & (where < rows.end[:, None])
    return dataclasses.replace(
        record, rows=rows, masks={'train': mask.astype(np.float32)},
        reward={'task': rows.tokens.sum(1) % 3.0})

  task = rollout.Task(lambda record: record, answer)
  num_rows = len(PROMPTS) * GROUP
  return rollout.collect(METHOD, made, task, Record(3, {}), num_rows, jax.random.key(2), refills=0)


def batches(record, uses=1):
  return list(rollout.minibatches(METHOD, record, 2, uses, 0))


@functools.partial(jax.jit, static_argnums=0)
def forward(replay, params, batch):
  scores, output = engine.make_forward(CFG, replay)(params, batch, (LOGP,))
  return scores[LOGP], output


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient(replay, microbatches, params, batch):
  loss = step_lib.make_loss(engine.make_forward(CFG, replay), METHOD.terms)
  return step_lib.make_gradient(loss, model.specs(CFG), microbatches)(params, batch)


def known(batch):
  """Positions that the sampler read, all of a row but its last: [n, T]."""
  return np.arange(batch.tokens.shape[1]) < batch.segments.sum(1, keepdims=True) - 1


def test_recorded_are_the_experts_that_the_forward_pass_takes():
  """Ragged prompts padded on the left, groups, rows that end early."""
  record = collected(False)
  rows = record.rows
  assert len(set(rows.end - rows.start)) > 2 and rows.routes.keys() == LAYERS
  for batch in batches(record):
    logp, output = forward(False, params(), batch)
    for i in LAYERS:
      assert batch.routes[i].dtype == np.int8
      np.testing.assert_array_equal(
          batch.routes[i], np.where(known(batch)[..., None], output.routes[i], -1))
    np.testing.assert_allclose(
        logp * batch.masks['train'], batch.data[label(SAMPLER)], atol=2e-5)


def test_a_batch_that_is_kept_for_a_post_mortem_has_its_routes(tmp_path):
  batch = batches(collected(False))[0]
  with np.load(loop.dump_batch(str(tmp_path / 'batch.npz'), batch)) as kept:
    np.testing.assert_array_equal(kept['routes/2'], batch.routes[2])
    np.testing.assert_array_equal(kept['masks/train'], batch.masks['train'])


def test_many_experts_are_recorded_in_more_bits_and_dense_models_record_nothing():
  tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)

  def kinds(**changes):
    cfg = dataclasses.replace(CFG, **changes)
    decoder, table = engine.make_decoder(cfg, record=True), param.abstract(model.specs(cfg))
    extras = jax.eval_shape(lambda p, t: decoder.prefill(p, t, t[:, 0], 5)[2], table, tokens)
    return {i: x.dtype for i, x in extras.items()}

  for experts, dtype in ((128, np.int8), (129, np.int16)):
    assert kinds(moe=MoE(experts=experts, ffw_dim=8)) == dict.fromkeys(LAYERS, np.dtype(dtype))
  assert kinds(pattern=('attention',), tail=(), moe=MoE()) == {}


def test_replay_takes_the_recorded_experts_in_every_minibatch_and_use_and_chooses_elsewhere():
  found = batches(collected(True), uses=2)
  assert len(found) == 4
  for batch in found:
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
  assert gap[True] < 0.5 * gap[False], gap      # measured: 0.3
  for replay in (False, True):
    assert rollout.parity(collected(replay))['parity/max'] < 2e-5


def test_replay_of_its_own_choice_changes_nothing():
  batch = batches(collected(False))[0]
  free, bound = (gradient(r, 1, params(), batch) for r in (False, True))
  jax.tree.map(np.testing.assert_array_equal, bound, free)
  assert free[1]['routes/mismatch'] == 0
  grads = param.flat(bound[0])
  for name in ('blocks/1/ffn/router', 'tail/0/ffn/router'):        # which learns under replay
    assert np.abs(grads[name]).max() > 1e-6


@pytest.mark.parametrize('replay, microbatches', [(False, 1), (True, 1), (True, 4)])
def test_mismatch_is_the_share_of_trained_tokens_and_layers_whose_experts_differ(
    replay, microbatches):
  batch = batches(collected(True))[0]
  _, output = forward(replay, moved(), batch)
  counted = known(batch) & (batch.masks['train'] > 0)
  differ = [np.sort(output.own_routes[i])[counted] != np.sort(batch.routes[i])[counted]
            for i in LAYERS]
  expected = np.mean([d.any(-1) for d in differ])
  assert 0.05 < expected < 0.95
  grads, metrics = gradient(replay, microbatches, moved(), batch)
  np.testing.assert_allclose(metrics['routes/mismatch'], expected, rtol=1e-6)
  assert 'routes/weight' not in metrics
  assert_close((grads, metrics), gradient(replay, 1, moved(), batch))


def assert_close(actual, expected):
  """Every leaf to rounding of its largest entry."""
  for (path, e), a in zip(
      jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True):
    atol = 2e-5 * np.abs(e).max() + 1e-7
    np.testing.assert_allclose(a, e, rtol=0, atol=atol, err_msg=str(path))


def test_experts_over_eight_devices_record_and_replay_alike():
  record = collected(True)
  batch = batches(record)[0]
  mesh = mesh_lib.make_mesh({'data': 2, 'expert': 4})
  with jax.set_mesh(mesh):
    given = jax.device_put(moved(), param.shardings(model.specs(CFG), mesh, dict(CFG.rules)))
    rows = mesh_lib.put_global(batch, mesh)
    grads, metrics = gradient(True, 1, given, rows)
    sampled = engine.make_sample(CFG, mesh, WIDTH, record=True)(
        given, PROMPTS, GROUP, SAMPLING, jax.random.key(4)).routes
  expected = gradient(True, 1, moved(), batch)
  assert_close((grads, metrics), expected)
  jax.tree.map(np.testing.assert_array_equal, metrics['load'], expected[1]['load'])
  jax.tree.map(np.testing.assert_array_equal, sampled,
               draw()(moved(), PROMPTS, GROUP, SAMPLING, jax.random.key(4)).routes)


def test_a_run_with_replay_logs_no_mismatch_and_resumes_bit_for_bit(tmp_path):
  options = ('phases=rl', 'model.ffn=moe', 'model.repeats=1', 'model.moe.experts=4',
             'model.moe.bias_rate=0.01', 'rl.routing_replay=true', 'rl.steps=2', 'rl.uses=2',
             'rl.grpo.beta=0.0', 'checkpoint.every=1', 'eval.every=2')
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
