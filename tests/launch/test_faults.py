"""What goes wrong while a run runs: numbers that are not finite, nothing to learn from, no room."""

import contextlib
import resource

import numpy as np
import pytest

import train_runs
from launch import metrics


@pytest.mark.parametrize('rate, saved, said', [
    # After the first update the loss of the second step is not finite any more.
    (1e37, [1], 'step 2: loss '),
    # The first update itself overflows float32.
    (1e39, [], 'step 1: parameters or moments are not finite after the update'),
])
def test_a_run_stops_where_numbers_are_not_finite(tmp_path, capsys, rate, saved, said):
  overrides = ('phases=sft', 'checkpoint.every=1', f'sft.optimizer.learning_rate={rate}')
  assert train_runs.run(tmp_path, *overrides) == 1
  lines = capsys.readouterr().out.splitlines()
  assert lines[-2].startswith(f'warning, {said}') and lines[-1].startswith('stopped: ')
  assert train_runs.steps(tmp_path) == saved
  for step in saved:
    assert all(np.isfinite(x).all() for x in train_runs.state(tmp_path, step).values())
  (path,) = tmp_path.glob('bad_batch_*.npz')
  assert str(path) in lines[-2]
  with np.load(path) as batch:
    assert batch['tokens'].shape == (8, 16) and batch['masks/train'].any()
  (warning,) = metrics.read_lines(tmp_path / 'warnings.jsonl')
  assert warning['step'] == len(saved) + 1 and said.partition(': ')[2] in warning['text']


def test_a_refused_step_changes_nothing(tmp_path):
  """The step before is what every later checkpoint would hold, were the run to go on."""
  overrides = ('phases=sft', 'checkpoint.every=1', 'sft.optimizer.learning_rate=1e37')
  for _ in range(2):                     # the rerun meets the same step, and the same end
    assert train_runs.run(tmp_path, *overrides) == 1
    assert train_runs.steps(tmp_path) == [1]


def test_every_sample_filtered_away_ends_the_run(monkeypatch, capsys, tmp_path):
  """A reward that is always 0 leaves no group to learn from."""
  reward = tmp_path / 'reward.py'
  reward.write_text('def score(prompt, response, row):\n  return 0.0\n')
  run = tmp_path / 'run'
  line = train_runs.failed(
      monkeypatch, capsys, run, 'phases=rl', 'rl.methods=mixed_groups,grpo', 'rl.steps=9',
      f'rl.rewards.digits={reward}:score', f'rl.rewards.exact={reward}:score', 'rl.refills=1',
      'rl.max_empty=3')
  assert 'every sample was filtered away in 3 steps running (after 1 refills each)' in line
  steps = train_runs.logged(run)
  assert list(steps) == [('rl', 1), ('rl', 2)]
  assert all(v['rows_filtered'] == 32 and 'loss' not in v for v in steps.values())
  texts = [line['text'] for line in metrics.read_lines(run / 'warnings.jsonl')]
  assert texts == ['every sample was filtered away: no update'] * 2


@contextlib.contextmanager
def no_files_above(size):
  """The system refuses to write larger files, as it refuses any when the disk is full."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_a_checkpoint(monkeypatch, capsys, tmp_path):
  overrides = ('phases=sft', 'sft.steps=6')
  assert train_runs.run(tmp_path / 'whole', *overrides) == 0
  again = train_runs.rewound(tmp_path / 'whole', 2, tmp_path / 'again')
  with no_files_above(1 << 14):
    line = train_runs.failed(monkeypatch, capsys, again, *overrides)
  assert 'of step 4 could not be written' in line and '[2] are whole' in line
  assert train_runs.steps(again) == [2]
  assert train_runs.run(again, *overrides) == 0
  train_runs.assert_same_checkpoint(tmp_path / 'whole', again, 6)
