"""Comparisons: what ran is not run again, what failed says so, arms are as large as each other."""

import argparse
import json

import pytest

from experiments import common

# Stands in for launch/train.py: notes how it was called, and fails if told to.
TRAIN = """
import json, pathlib, sys
where = pathlib.Path(sys.argv[sys.argv.index('--workdir') + 1])
if '--config.fail=True' in sys.argv:
  sys.exit(3)
with open(where / 'metrics.jsonl', 'a') as f:
  f.write(json.dumps({'step': 1, 'loss': 2.0, 'arguments': sys.argv[1:]}) + '\\n')
"""


@pytest.fixture
def options(tmp_path, monkeypatch):
  (tmp_path / 'launch').mkdir()
  (tmp_path / 'launch/train.py').write_text(TRAIN)
  monkeypatch.setattr(common, 'ROOT', tmp_path)
  return argparse.Namespace(workdir=tmp_path / 'runs', seeds=[0, 1], arms=None, jobs=2)


def test_every_arm_and_seed_runs_once(options):
  arms = [common.Arm('a', 'c.py', ('x=1',)), common.Arm('b, wide', 'c.py', flags=('--allow',))]
  common.run_all(arms, options)
  common.run_all(arms, options)
  for arm in arms:
    for seed in options.seeds:
      line, = common.lines(options.workdir, arm, seed)
      assert f'--config.seed={seed}' in line['arguments']
      assert ('--config.x=1' in line['arguments']) == (arm.name == 'a')
      assert ('--allow' in line['arguments']) == (arm.name != 'a')


def test_a_failed_run_is_named_and_run_again(options):
  broken = common.Arm('a', 'c.py', ('fail=True',))
  with pytest.raises(RuntimeError, match=r'a with seed 0 ended with 3; see .*log\.txt'):
    common.run_all([broken], options)
  common.run_all([common.Arm('a', 'c.py')], options)
  assert common.last(options.workdir, broken, 1, 'loss') == 2.0


def test_what_begins_a_workdir_runs_before_and_once(options):
  begin = ('import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(); '
           '(p / "n").write_text(sys.argv[2])')
  arm = common.Arm(
      'a', 'c.py', start=lambda folder, seed: ['-c', begin, folder / 'checkpoints', seed])
  common.run_all([arm], options)
  for seed in options.seeds:
    folder = common.folder(options.workdir, arm, seed)
    assert (folder / 'checkpoints/n').read_text() == str(seed)
    (folder / 'done.json').unlink()
  common.run_all([arm], options)                         # mkdir would refuse to be run again
  assert len(common.lines(options.workdir, arm, 0)) == 2


def test_missing_metrics_are_not_numbers(options):
  arm = common.Arm('a', 'c.py')
  assert common.lines(options.workdir, arm, 0) == []
  assert str(common.last(options.workdir, arm, 0, 'loss')) == 'nan'


def test_arms_have_as_many_parameters_as_each_other():
  kinds = {name: (f'model.gdn.variant={name}',) for name in ('gdn', 'fg2_plus')}
  arms = common.equal('configs/mqar.py', kinds, range(128, 512, 2))
  small, large = (common.count('configs/mqar.py', arm.overrides) for arm in arms)
  assert abs(small - large) < 0.005 * large
  assert arms[0].overrides != arms[1].overrides


def test_spread_is_over_seeds_with_one_degree_less():
  assert common.mean_and_spread([1.0, 2.0, 3.0], 2) == '2.00 ± 1.00'
  assert common.mean_and_spread([1.0], 2) == '1.00'


def test_table_and_figure(tmp_path):
  assert common.table(('a', 'b'), [('1', '2')]) == '| a | b |\n| --- | --- |\n| 1 | 2 |'
  for name in ('one', 'two'):
    common.figure(tmp_path / f'{name}.svg', lambda axes: axes.plot([1, 2], [3, 4]))
  assert (tmp_path / 'one.svg').read_text() == (tmp_path / 'two.svg').read_text()
  assert json.dumps((tmp_path / 'one.svg').read_text()).count('</svg>') == 1
