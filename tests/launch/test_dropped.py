"""Choices of experts that found no room: counted in the train step, and nowhere else dropped."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_runs
from launch import engine, optimizer
from launch import mesh as mesh_lib
from launch import step as step_lib
from nn import model, param
from nn.config import MoE, without_drops
from nn.types import LOGP
from rl.types import Term
from tests.moe import moe_tiny
from tests.nn import nn_tiny

N, T = 8, 6
CFG = nn_tiny.config(
    head=(), pattern=(('attention', 'moe'),), moe=MoE(experts=4, top_k=2, ffw_dim=8, buffer=1.0))
NLL = Term('nll', lambda view: (-view.given[LOGP], {}), (LOGP,))
MESH = functools.partial(mesh_lib.make_mesh, {'expert': 4})


def batch():
  rows = nn_tiny.batch(nn_tiny.tokens(N, T))
  weight = jnp.ones((N, T)) / (N * T)
  return dataclasses.replace(
      rows, masks={'train': jnp.ones((N, T))}, weights={'nll': weight},
      coef={'nll': jnp.float32(1)})


def forward(cfg, params, rows):
  return jax.jit(lambda p, b: engine.make_forward(cfg)(p, b, (LOGP,))[1])(params, rows)


@pytest.mark.parametrize('microbatches, count', [(1, 96), (2, 64)])
def test_drops_are_those_of_all_microbatches_layers_and_devices(microbatches, count):
  """All scores are equal, so all go to the first two experts, each on a device of its own.

  In both layers each gets the 48 tokens and has room for 24; of two microbatches each time 24 and
  room for 12, rounded up to 16.
  """
  params, rows = moe_tiny.draw(model.specs(CFG)), batch()
  params['blocks']['0']['ffn']['router'] *= 0
  tx = optimizer.make(model.specs(CFG))
  state = step_lib.TrainState(
      jnp.int32(0), params, tx.init(param.split(params, model.specs(CFG))[0]))
  with jax.set_mesh(MESH()):
    step = jax.jit(step_lib.make_train_step(
        step_lib.make_loss(engine.make_forward(CFG), (NLL,)), tx, model.specs(CFG), microbatches))
    _, metrics = step(state, mesh_lib.put_global(rows, MESH()), 0.0)
  assert metrics['load/dropped'] == count
  np.testing.assert_allclose(metrics['load/dropped_share'], count / (2 * 2 * N * T), rtol=1e-6)


def test_scoring_and_sampling_drop_nothing():
  params, rows = moe_tiny.draw(model.specs(CFG)), batch()
  with jax.set_mesh(MESH()):
    held, dropping = (forward(cfg, params, rows) for cfg in (without_drops(CFG), CFG))
    assert not held.dropped and np.abs(held.hidden - dropping.hidden).max() > 1e-3
    score = engine.make_score(CFG, MESH(), N)
    found = score(params, np.asarray(rows.tokens), np.full(N, T), None, None, {}, (LOGP,), 1.0)
    whole = engine.make_score(without_drops(CFG), MESH(), N)(
        params, np.asarray(rows.tokens), np.full(N, T), None, None, {}, (LOGP,), 1.0)
    np.testing.assert_array_equal(found[LOGP], whole[LOGP])
    decoder = engine.make_decoder(CFG)
    read = jax.jit(lambda p, t: decoder.prefill(p, t, jnp.zeros(N, jnp.int32), T)[0])
    logits = read(model.prepare(params, CFG), rows.tokens)
    np.testing.assert_allclose(
        logits, model.unembed(params, CFG, held.hidden[:, -1]), atol=1e-4)


@pytest.mark.parametrize('changes, match', [
    (('model.moe.buffer=1.25',), 'no rows travel to experts on other devices'),
    (('model.moe.buffer=0.9', 'mesh.expert=4'), 'model.moe.buffer is 0.9, wanted at least 1'),
])
def test_buffers_without_effect_are_refused_at_the_door(tmp_path, monkeypatch, capsys, changes,
                                                        match):
  line = train_runs.refused(
      monkeypatch, capsys, tmp_path / 'run', 'phases=sft', 'model.ffn=moe', *changes)
  assert re.search(match, line), line
