"""A run that was interrupted goes on bit for bit like one that was not."""

import numpy as np
import pytest

import train_runs

# All that a step may depend on: sub-streams, packing, microbatches, several updates per rollout, a
# filter with refills, a reference policy, a reward in a worker, weights on the sampler mismatch.
REWARD = '''
import zlib

def score(prompt, response, row):
  return float(zlib.crc32(response.encode()) % 4 == 0)
'''


def settings(folder):
  (folder / 'reward.py').write_text(REWARD)
  return (
      'phases=pretrain,sft,rl', 'streams=2',
      *train_runs.pretraining(folder), 'pretrain.steps=4', 'pretrain.data.heldout=0.2',
      'pretrain.optimizer.name=muon',
      'sft.microbatches=2', 'sft.optimizer.schedule=cosine', 'rl.optimizer.warmup=3',
      'rl.parts=2', 'rl.uses=2', 'rl.microbatches=2', 'rl.methods=mixed_groups,grpo,tis',
      'rl.refills=1', f'rl.rewards.drawn={folder / "reward.py"}:score', 'eval.pass_k=2')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """(overrides, workdir) of a run without interruption: 4 steps of every phase, each 2nd saved."""
  folder = tmp_path_factory.mktemp('whole')
  overrides = settings(folder)
  assert train_runs.run(folder / 'run', *overrides) == 0
  assert train_runs.steps(folder / 'run') == [2, 4, 6, 8, 10, 12]
  rl = [x for (phase, _), x in train_runs.logged(folder / 'run').items() if phase == 'rl']
  assert max(x['rows_filtered'] for x in rl) > 0 and max(x['draws'] for x in rl) == 2
  assert max(x['kl'] for x in rl) > 0 and max(x['groups_with_signal'] for x in rl) == 1
  return overrides, folder / 'run'


@pytest.mark.parametrize('step, every', [
    (2, 2),                # in the middle of pretraining
    (4, 3),                # between pretraining and SFT, evaluated at other steps
    (6, 1),                # in the middle of SFT, evaluated at every step
    (10, 4),               # in the middle of RL
])
def test_the_next_steps_are_bit_identical(whole, tmp_path, step, every):
  overrides, first = whole
  again = train_runs.rewound(first, step, tmp_path / 'again')
  assert train_runs.run(again, *overrides, f'eval.every={every}') == 0
  assert train_runs.steps(again) == train_runs.steps(first)
  for saved in train_runs.steps(first):
    if saved > step:
      train_runs.assert_same_checkpoint(first, again, saved)
  assert train_runs.logged(again) == train_runs.logged(first)
  before, after = (train_runs.logged(x, evaluations=True) for x in (first, again))
  both = before.keys() & after.keys()
  assert {('sft', 4), ('rl', 8), ('rl', 12)} <= both
  assert {k: before[k] for k in both} == {k: after[k] for k in both}


def test_a_phase_that_reaches_its_aim_ends_there(tmp_path):
  """The next phase begins at the step where it would have, also after an interruption."""
  plain, early, again = (tmp_path / name for name in ('plain', 'early', 'again'))
  assert train_runs.run(plain, 'phases=sft') == 0
  loss = train_runs.logged(plain, evaluations=True)['sft', 2]['eval/loss']
  overrides = ('phases=sft,pretrain', f'sft.until=eval/loss<={loss}', 'pretrain.steps=2',
               *train_runs.pretraining(tmp_path))
  assert train_runs.run(early, *overrides) == 0
  assert list(train_runs.logged(early)) == [
      ('sft', 1), ('sft', 2), ('pretrain', 5), ('pretrain', 6)]
  assert train_runs.steps(early) == [4, 6]
  before, after = train_runs.state(plain, 2), train_runs.state(early, 4)
  for name, x in before.items():
    np.testing.assert_array_equal(x, after[name], err_msg=name)
  train_runs.rewound(early, 4, again)
  assert train_runs.run(again, *overrides) == 0
  train_runs.assert_same_checkpoint(early, again, 6)
