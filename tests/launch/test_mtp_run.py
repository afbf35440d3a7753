"""A run whose model predicts several tokens.

SFT with a schedule, then RL by OCC; and from a model that had no heads.
"""

import types

import jax
import numpy as np
import pytest
import train_runs

from launch import checkpoint, text_phase
from nn import param

HEADS = ('model.mtp.depth=1', 'sft.steps=3', 'sft.mtp.coef=0.3', 'sft.mtp.switch=2',
         'sft.mtp.later=0.1', 'rl.steps=2', 'rl.parts=2', 'rl.methods=grpo,mtp_occ',
         'eval.every=10')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('mtp') / 'run'
  assert train_runs.run(workdir, *HEADS) == 0
  return workdir


def test_losses_and_coefficients_are_told(run):
  steps = train_runs.logged(run)
  for step, coef in ((1, 0.3), (2, 0.3), (3, 0.1)):
    told = steps['sft', step]
    assert told['loss'] == pytest.approx(told['nll'] + coef * told['mtp_ce'], rel=1e-5)
    assert (told['mtp/loss1'] == pytest.approx(told['mtp_ce'], rel=1e-6)
            and 0 <= told['mtp/agrees1'] <= 1)
  rl = steps['rl', 4]
  assert {'mtp_occ/lambda1', 'mtp_occ/c1', 'mtp_occ/v21', 'mtp_occ/active1',
          'mtp/right1'} <= rl.keys()
  assert rl['mtp_occ/v21'] > 0


def test_a_run_goes_on_as_it_would_have(run, tmp_path):
  again = train_runs.rewound(run, 4, tmp_path / 'again')
  assert train_runs.run(again, *HEADS) == 0
  train_runs.assert_same_checkpoint(run, again, 5)
  assert train_runs.logged(run)['rl', 5] == train_runs.logged(again)['rl', 5]


def test_heads_begin_fresh_on_a_model_without(tmp_path):
  abstract = {'embed': {'table': jax.ShapeDtypeStruct((4, 2), np.float32)},
              'mtp': {'0': {'project': jax.ShapeDtypeStruct((4, 2), np.float32)}}}
  whole = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), abstract)
  checkpoint.save_params(tmp_path / 'with', whole, {})
  checkpoint.save_params(tmp_path / 'without', {'embed': whole['embed']}, {})
  assert param.flat(checkpoint.as_saved(tmp_path / 'with', abstract)).keys() == {
      'embed/table', 'mtp/0/project'}
  assert param.flat(checkpoint.as_saved(tmp_path / 'without', abstract)).keys() == {'embed/table'}


def block(**changes):
  return types.SimpleNamespace(**(dict(coef=0.3, switch=0, later=0.1, detach=()) | changes))


@pytest.mark.parametrize('changes, depth, message', [
    ({}, 0, 'sft.mtp: the model has no heads of multi-token prediction; set model.mtp.depth'),
    ({'coef': -1.0}, 1, 'sft.mtp: coef -1.0'), ({'switch': 2, 'later': -0.5}, 1, 'later -0.5'),
    ({'detach': ('tail',)}, 1, r"detach names \['tail'\], wanted some of embedding, head, trunk")])
def test_settings_are_checked(changes, depth, message):
  with pytest.raises(ValueError, match=message):
    text_phase.make_method('sft.mtp', block(**changes), depth, 0)


def test_settings_without_heads_stop_the_run(monkeypatch, capsys, tmp_path):
  assert train_runs.refused(
      monkeypatch, capsys, tmp_path / 'a', 'sft.mtp.coef=0.3').startswith(
          'sft.mtp: the model has no')
  assert 'sft.mtp.switch' in train_runs.refused(
      monkeypatch, capsys, tmp_path / 'b', 'model.mtp.depth=1', 'sft.mtp.switch=3')
  assert 'mtp_occ: the model has no heads' in train_runs.refused(
      monkeypatch, capsys, tmp_path / 'c', 'rl.methods=grpo,mtp_occ')
