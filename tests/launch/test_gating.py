"""Rollout reuse behind a gate, in the train step and in whole runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_runs as runs

from launch import engine, optimizer, rl_parts, rl_phase
from launch import step as step_lib
from nn import model, param
from nn.types import LOGP, PULL
from rl import gate, methods
from rl.types import OLD, label
from tests.nn import nn_tiny

N, T = 8, 10
METHOD = rl_phase.watched(
    methods.build(('group_advantage', 'policy'), {'policy': {'aggregate': 'token_mean'}}), True)


class Run:
  """What rl_parts.build_watch reads of a run."""

  def __init__(self, cfg):
    self.cfg, self.specs = cfg, model.specs(cfg)


class Gate:
  window = 4


class Options:
  watch, gate = True, Gate


def batch_of(cfg, scale=1.0, seed=0):
  rng = np.random.default_rng(seed)
  rows = nn_tiny.batch(nn_tiny.tokens(N, T, seed=seed))
  mask = (rng.random((N, T)) < 0.7).astype(np.float32)
  mask[:, 0] = 0
  terms = [t for t in METHOD.terms if t.name in ('policy', 'shift')]
  old = nn_scores(nn_tiny.params(cfg, 1), cfg, rows)[LOGP]
  return dataclasses.replace(
      rows, masks={'train': jnp.asarray(mask)},
      weights={t.name: jnp.asarray(t.aggregate(mask), jnp.float32) for t in terms},
      coef={'policy': jnp.float32(1), 'shift': jnp.float32(0)}, data={label(OLD): old},
      advantage=jnp.asarray(scale * rng.choice([-1.0, 1.0], (N, 1)) * np.ones((N, T)), jnp.float32))


@functools.partial(jax.jit, static_argnums=1)
def nn_scores(params, cfg, rows):
  return engine.make_forward(cfg)(params, rows, (LOGP, PULL))[0]


@functools.partial(jax.jit, static_argnums=(0, 3))
def gradient(cfg, batch, params, microbatches=1):
  terms = tuple(t for t in METHOD.terms if t.name in ('policy', 'shift'))
  run = Run(cfg)
  return step_lib.make_gradient(
      step_lib.make_loss(engine.make_forward(cfg), terms), run.specs, microbatches,
      rl_parts.build_watch(run, Options))(params, batch)


@functools.partial(jax.jit, static_argnums=0)
def head_by_hand(cfg, batch, params):
  """The policy term's gradient in the head alone, the embedding held."""
  table = params['embed' if cfg.tied else 'unembed']

  def loss(head):
    given = nn_scores(params | {'unembed': head}, cfg, batch)
    ratio = jnp.exp(given[LOGP] - batch.data[label(OLD)])
    clipped = jnp.clip(ratio, 0.8, 1.2)
    surrogate = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
    return -jnp.sum(batch.weights['policy'] * surrogate)

  return jax.grad(loss)(table)['table']


@pytest.mark.parametrize('tied', [True, False])
def test_the_head_is_measured_by_its_own_side(tied):
  cfg = nn_tiny.config(tied=tied)
  params, batch = nn_tiny.params(cfg), batch_of(cfg)
  grads, metrics = gradient(cfg, batch, params)
  norm = np.linalg.norm(head_by_hand(cfg, batch, params))
  np.testing.assert_allclose(metrics['grad_norm/head'], norm, rtol=1e-4)
  assert ('unembed' in grads) == (not tied)
  plain = jax.jit(step_lib.make_gradient(
      step_lib.make_loss(engine.make_forward(cfg), METHOD.terms[:1]),
      model.specs(cfg)))(params, batch)[0]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), grads, plain)
  layer = optax.tree.norm(jax.tree.map(lambda a: a[0], plain['blocks']['0']))
  np.testing.assert_allclose(metrics['grad_norm/middle'], layer, rtol=1e-4)


def test_microbatches_and_devices_change_no_measure():
  cfg = nn_tiny.config()
  params, batch = nn_tiny.params(cfg), batch_of(cfg)
  whole = gradient(cfg, batch, params)[1]
  parts = gradient(cfg, batch, params, 4)[1]
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows, every = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*p))
                 for p in (('data',), ()))
  spread = jax.device_put(batch, jax.tree.map(lambda x: rows if np.ndim(x) else every, batch))
  with jax.set_mesh(mesh):
    eight = gradient(cfg, spread, jax.device_put(params, every))[1]
  for name in ('grad_norm/head', 'grad_norm/middle', 'shift/chi2', 'shift/bound'):
    np.testing.assert_allclose(parts[name], whole[name], rtol=2e-4)
    np.testing.assert_allclose(eight[name], whole[name], rtol=2e-4)


@pytest.mark.parametrize('seed', range(4))
def test_the_heads_gradient_bounds_the_shift_from_below(seed):
  cfg = nn_tiny.config()
  metrics = gradient(cfg, batch_of(cfg, seed=seed), nn_tiny.params(cfg, seed + 2))[1]
  assert metrics['shift/bound'] <= metrics['shift/chi2'] * (1 + 1e-5)
  assert metrics['shift/chi2'] > 0.1 and metrics['shift/bound'] > -1


def test_pull_is_the_squared_norm_of_a_tokens_gradient_in_the_head():
  cfg = nn_tiny.config(tied=False)
  params = nn_tiny.params(cfg)
  rows = dataclasses.replace(nn_tiny.batch(nn_tiny.tokens(1, 5)), temperature=jnp.float32(0.7))
  pull = nn_scores(params, cfg, rows)[PULL]
  grads = jax.jit(jax.jacrev(lambda head: nn_scores(
      params | {'unembed': head}, cfg, rows)[LOGP][0]))(params['unembed'])
  for t in range(1, 5):
    np.testing.assert_allclose(pull[0, t], np.square(grads['table'][t]).sum(), rtol=1e-4)


def test_a_planted_spike_is_refused_and_changes_nothing_but_the_gate():
  cfg = nn_tiny.config()
  run, specs = Run(cfg), model.specs(cfg)
  tx = gate.gate(optimizer.make(specs, clip=1.0), 0.5, 4)
  step = jax.jit(step_lib.make_train_step(
      step_lib.make_loss(engine.make_forward(cfg), METHOD.terms[:1]), tx, specs,
      watch=rl_parts.build_watch(run, Options)))
  params = nn_tiny.params(cfg)
  state = step_lib.TrainState(jnp.int32(0), params, tx.init(param.split(params, specs)[0]))
  use = lambda batch, n: dataclasses.replace(batch, use=jnp.int32(n))
  for seed in range(6):
    state, metrics = step(state, use(batch_of(cfg, seed=seed), 0), 1e-4)
    assert not metrics['gate/refused']
  spike = batch_of(cfg, scale=100.0)
  after, metrics = step(state, use(spike, 2), 1e-4)
  assert metrics['gate/refused'] == 1 and metrics['nonfinite'] == 0 and metrics['gate/z'] > 0.5
  jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
  jax.tree.map(np.testing.assert_array_equal, after.opt_state.inner, state.opt_state.inner)
  assert int(after.updates) == int(state.updates) and after.opt_state.refused
  passed, metrics = step(state, use(spike, 0), 1e-4)
  assert not metrics['gate/refused'] and int(passed.updates) == int(state.updates) + 1


REUSE = ('phases=rl', 'rl.uses=3', 'rl.steps=6', 'checkpoint.every=100', 'eval.every=100')
GATED = (*REUSE, 'rl.gate.window=2', 'rl.gate.threshold=-0.2', 'rl.watch=true',
         'checkpoint.every=1', 'checkpoint.keep=20')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('gating')


@pytest.fixture(scope='module')
def gated(folder):
  where = folder / 'gated'
  assert runs.run(where, *GATED) == 0
  return where


def test_a_refusal_ends_the_reuse_and_the_next_step_samples_anew(gated):
  updates = [
      line['gate/updates'] for (phase, _), line in runs.logged(gated).items() if phase == 'rl']
  assert len(updates) == 6 and set(updates) <= {1, 2, 3} and min(updates) < 3
  evaluations = runs.logged(gated, evaluations=True)
  drift = {step: line for (phase, step), line in evaluations.items() if phase == 'rl'}
  first, last = drift[min(drift)], drift[max(drift)]
  assert all(value == 0 for name, value in first.items() if name.startswith('drift/'))
  assert last['drift/embed'] > 0 and last['drift/layer 0'] > 0


def test_decisions_are_the_same_after_a_restart(gated, folder):
  again = runs.rewound(gated, 3, folder / 'again')
  assert runs.run(again, *GATED) == 0
  runs.assert_same_checkpoint(gated, again, 6)
  assert runs.logged(again)['rl', 6] == runs.logged(gated)['rl', 6]


def test_an_open_gate_is_plain_reuse(folder):
  for name, extra in (('plain', ()), ('open', ('rl.gate.window=2', 'rl.gate.threshold=1e9'))):
    assert runs.run(folder / name, *REUSE, 'rl.watch=true', *extra) == 0
  plain, opened = (runs.logged(folder / name) for name in ('plain', 'open'))
  for at, line in plain.items():       # the compiler rounds two programs differently
    for name, value in line.items():
      np.testing.assert_allclose(
          opened[at][name], value, rtol=1e-3, atol=1e-4, err_msg=f'{at} {name}')
  assert {line['gate/updates'] for (phase, _), line in opened.items() if phase == 'rl'} == {3}


def test_options_of_a_gate_that_is_not_there_are_refused(tmp_path, monkeypatch, capsys):
  line = runs.refused(monkeypatch, capsys, tmp_path / 'a', 'rl.gate.threshold=0.3')
  assert 'rl.gate.threshold' in line
  assert 'rl.gate.window' in runs.refused(monkeypatch, capsys, tmp_path / 'b', 'rl.gate.window=1')
