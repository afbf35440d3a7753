"""A run whose experts are multiplied on the way: one run, that resumes anywhere, bit for bit."""

import json
import re

import numpy as np
import pytest

import train_runs
from launch import checkpoint, growth, report, talk

GROWS = ('model.ffn=moe', 'model.moe.experts=4', 'model.moe.bias_rate=0.01', 'model.repeats=1',
         'upcycle.at_step=2')
RUN = (*GROWS, 'phases=sft,pretrain', 'sft.microbatches=2', 'sft.optimizer.schedule=wsd',
       'sft.optimizer.warmup=2', 'sft.optimizer.decay=2', 'upcycle.selection=grad_sq',
       'upcycle.score_batches=2', 'upcycle.cap=2', 'checkpoint.every=1', 'eval.every=3',
       'pretrain.steps=1', 'pretrain.rows=8', 'pretrain.length=16',
       'pretrain.reset_optimizer=false')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """(overrides, workdir): 4 steps of SFT, the model grows after 2, and 1 step of pretraining."""
  folder = tmp_path_factory.mktemp('whole')
  (folder / 'text.txt').write_bytes(bytes(range(32, 127)) * 12)
  overrides = (*RUN, f'pretrain.data.files={folder / "text.txt"}')
  assert train_runs.run(folder / 'run', *overrides) == 0
  return overrides, folder / 'run'


def experts(workdir, step):
  state = train_runs.state(workdir, step)
  return {x.shape[1] for name, x in state.items() if name.endswith("['ffn']['gate']")}


def test_it_is_one_run(whole):
  _, workdir = whole
  assert train_runs.steps(workdir) == [1, 2, 3, 4, 5]
  # The checkpoint of the step of growth is the model before.
  assert [experts(workdir, step) for step in (1, 2, 3, 4, 5)] == [{4}, {4}, {8}, {8}, {8}]
  logged = train_runs.logged(workdir)
  assert list(logged) == [('sft', 1), ('sft', 2), ('sft', 3), ('sft', 4), ('pretrain', 5)]
  rates = [values['learning_rate'] for values in logged.values()][:4]
  np.testing.assert_allclose(rates, [1e-3 / 3, 2e-3 / 3, 2e-3 / 3, 1e-3 / 3])
  evaluated = [line['step'] for line in report.history.load([workdir])[0].lines
               if line['phase'] == 'sft' and 'eval/loss' in line]
  assert evaluated == [0, 2, 2, 4]                    # before and after
  found = json.loads((workdir / growth.DOCUMENT).read_text())
  layer = found['layers']['blocks/0/ffn']
  assert found['step'] == 2 and found['how']['score_batches'] == 2
  assert sum(layer['copies'][0]) == 8 and max(layer['copies'][0]) == 3
  assert report.history.load([workdir])[0].grown == 2
  assert 'grown at step 2' in report.build([workdir]).read_text()


@pytest.mark.parametrize('step', [1, 2, 3])
def test_it_goes_on_bit_for_bit(whole, tmp_path, step):
  """Before the growth, at it, and after it."""
  overrides, first = whole
  again = train_runs.rewound(first, step, tmp_path / 'again')
  (again / growth.DOCUMENT).unlink()
  assert train_runs.run(again, *overrides) == 0
  for saved in train_runs.steps(first):
    train_runs.assert_same_checkpoint(first, again, saved)
  for evaluations in (False, True):
    assert train_runs.logged(again, evaluations) == train_runs.logged(first, evaluations)
  if step < 3:
    found = [json.loads((w / growth.DOCUMENT).read_text())['layers'] for w in (first, again)]
    assert found[0] == found[1]


def test_eight_devices_grow_as_one(whole, tmp_path):
  overrides, first = whole
  again = train_runs.rewound(first, 1, tmp_path / 'again')
  assert train_runs.run(again, *overrides, 'mesh.data=2', 'mesh.expert=4',
                        'sft.microbatches=1', 'pretrain.steps=0') == 0
  left, right = (train_runs.state(w, 4) for w in (first, again))
  for name, x in left.items():
    np.testing.assert_allclose(right[name], x, rtol=1e-3, atol=2e-5, err_msg=name)
  found = [growth.index_of(growth.read(w)) for w in (first, again)]
  for name, index in found[0].items():
    np.testing.assert_array_equal(index, found[1][name])


def test_both_models_of_a_run_can_be_asked(whole):
  _, workdir = whole
  for step, number in ((2, 4), (3, 8)):
    speaker = talk.open_model(str(workdir / checkpoint.FOLDER / str(step)), {'data': 1})
    assert speaker.cfg.moe.experts == number


@pytest.mark.parametrize('changes, match', [
    (('phases=sft', 'upcycle.at_step=4'), 'wanted a step between the ends .* has sft from 0 to 4'),
    (('phases=sft', 'upcycle.at_step=-1'), 'upcycle.at_step is -1'),
    (('phases=sft,rl', 'upcycle.at_step=6'), 'wanted a step between the ends of a phase of text'),
    (('phases=sft', 'upcycle.factor=0'), 'upcycle.factor is 0'),
    (('phases=sft', 'upcycle.at_step=0', 'upcycle.factor=3'), 'without effect: upcycle.factor = 3'),
    (('phases=sft', 'upcycle.cap=2'), 'without effect: upcycle.cap = 2'),
    (('phases=sft', 'upcycle.noise=0.1', 'model.moe.bias_rate=0'), 'without effect: upcycle.noise'),
    (('phases=sft', 'upcycle.router_noise=0.1', 'model.moe.bias_rate=0', 'model.moe.bias=true'),
     'without effect: upcycle.router_noise .* and bias True'),
    (('phases=sft', 'upcycle.selection=fresh', 'upcycle.optimizer=reset', 'upcycle.noise=0.1'),
     'without effect: upcycle.noise .*; upcycle.optimizer'),
    (('phases=sft', 'model.ffn=mlp', 'model.moe.experts=8', 'model.moe.bias_rate=0'),
     'the model has no experts to copy'),
    (('phases=sft', 'upcycle.selection=fisher', 'sft.optimizer.name=muon'), "take 'grad_sq'"),
    (('phases=sft', 'mesh.expert=4', 'mesh.data=1', 'model.moe.experts=6', 'sft.rows=8'),
     "axis 'expert' of size 6 cannot be split 4 ways"),
])
def test_growth_that_cannot_be_is_refused(tmp_path, monkeypatch, capsys, changes, match):
  line = train_runs.refused(monkeypatch, capsys, tmp_path / 'run', *GROWS, *changes)
  assert re.search(match, line), line
