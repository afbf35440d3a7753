"""Rewards, and a grader that survives verifiers that throw, hang, lie or die."""

import contextlib
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from rl import rewards
from rl.rewards import maths, pool, simple

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 1.0


@pytest.mark.parametrize('response, answer, expected', [
    ('85', '85', 1), (' 85\n', '85', 1), ('85', 85, 1), ('5+3=8#85', '85', 1),
    ('so\n#### 85', '85', 1), ('1#84#85', '85', 1), ('1#85#84', '85', 0), ('85 it is', '85', 0),
    ('', '85', 0), ('085', '85', 0), ('85', 'work\n#### 85', 1), ('#', '85', 0),
])
def test_exact(response, answer, expected):
  assert simple.exact('', response, {'answer': answer}) == expected


@pytest.mark.parametrize('response, expected', [
    ('so\n#### 72', 1), ('#### 72\n', 1), ('so\n#### -1,234.5', 1), ('so #### 72', 0.5),
    ('#### 72\nmore', 0.5), ('#### 71\n#### 72', 0.5), ('####72', 0.5), ('#### $72', 0.5),
    ('72', 0), ('#### ', 0), ('#### x', 0), ('', 0), ('### 72', 0),
])
def test_number_looks_at_the_form_alone(response, expected):
  assert simple.number('', response, {'answer': 'x'}) == expected


@pytest.mark.parametrize('response, expected', [
    ('0123456789', 1), ('1a2b', 0.5), ('ab', 0), ('', 0), ('²', 0)])
def test_digits(response, expected):
  assert simple.digits('', response, {}) == expected


@pytest.mark.parametrize('response, answer, expected', [
    ('so it is\n#### 72', '48/2=24\n#### 72', 1), ('#### 72', '#### 73', 0),
    ('#### 1,234', '1234', 1), ('#### 1234', '#### 1,234', 1), ('#### $1,234.50', '1234.5', 1),
    ('#### 72 apples', '72', 1), ('#### 72.', '72', 1), ('so it is \N{MINUS SIGN}5', '-5', 1),
    ('#### 7\n#### 8', '8', 1), ('#### 8\n#### 7', '8', 0), ('#### 5', '50', 0),
    ('\\boxed{\\frac{1}{2}}', '0.5', 1), ('\\boxed{1}, no, \\boxed{2}', '2', 1),
    ('#### 3 \\boxed{4}', '4', 1), ('\\boxed{\\sqrt{8}}', '2\\sqrt{2}', 1),
    ('\\boxed{(1,2)}', '(1,2)', 1), ('\\boxed{(1,3)}', '(1,2)', 0), ('\\boxed{50\\%}', '50\\%', 1),
    ('#### \\frac12', '1/2', 1), ('\\boxed{x+1}', '1+x', 1), ('x = 3', '3', 1),
    ('#### 5 m', '5', 1), ('I think - 5', '5', 1), ('2x - 1', 'x + x - 1', 1),
    ('first 5 and then 18', '18', 1), ('first 5 and then 18', '5', 0),
    ('the answer is $\\frac{3}{4}$', '0.75', 1), ('x' * 5000 + ' 12', '12', 1),
    ('', '3', 0), ('no idea', '3', 0), ('####', '3', 0), ('\\boxed{', '3', 0),
])
def test_maths(response, answer, expected):
  assert maths.equivalent('', response, {'answer': answer}) == expected


def test_a_row_without_an_answer_is_not_scored_in_silence():
  with pytest.raises(ValueError, match='no mathematical answer'):
    maths.equivalent('', '3', {'answer': ''})


HOSTILE = """
import ctypes, os, sys, time

def reward(prompt, response, row):
  match response:
    case 'hang':
      while True:
        pass
    case 'sleep':
      time.sleep(1000)
    case 'die':
      os._exit(3)
    case 'segfault':
      ctypes.string_at(0)
    case 'throw':
      raise RuntimeError('no ' + row['word'])
    case 'exit':
      sys.exit(1)
    case 'nan':
      return float('nan')
    case 'inf':
      return float('inf')
    case 'none':
      return None
    case 'string':
      return '1.0'
    case 'deep':
      return reward(prompt, response, row)
    case 'unspeakable':
      class Rude(Exception):
        def __str__(self):
          raise ValueError
      raise Rude
    case 'output':
      print('noise')
      os.write(1, b'noise')
  return len(prompt) + 0.5 * len(response)
"""


@pytest.fixture(scope='module')
def user_file(tmp_path_factory):
  file = tmp_path_factory.mktemp('rewards') / 'mine.py'
  file.write_text(HOSTILE)
  return file


@pytest.fixture(scope='module')
def hostile(user_file):
  with contextlib.closing(pool.Grader({'mine': f'{user_file}:reward'}, 2, DEADLINE)) as grader:
    yield grader


def items(*responses):
  return [('p', r, {'word': 'way', 'row_id': 100 + i}) for i, r in enumerate(responses)]


def test_a_users_reward_is_called_with_prompt_response_and_row_and_order_is_kept(hostile):
  responses = ['x' * (i % 7) for i in range(50)]
  scores, report = hostile.grade(items(*responses))
  np.testing.assert_array_equal(scores['mine'], [1 + 0.5 * len(r) for r in responses])
  assert scores['mine'].dtype == np.float64
  assert report == {'errors': 0, 'timeouts': 0, 'first_error': ''}


@pytest.mark.parametrize('what, errors, timeouts, message', [
    ('throw', 1, 0, 'RuntimeError: no way'), ('exit', 1, 0, 'SystemExit'), ('nan', 1, 0, 'nan'),
    ('inf', 1, 0, 'inf'), ('none', 1, 0, 'TypeError'), ('string', 1, 0, 'string'),
    ('deep', 1, 0, 'RecursionError'), ('unspeakable', 1, 0, 'Rude'), ('die', 1, 0, 'exit code 3'),
    ('segfault', 1, 0, 'exit code -11'), ('hang', 0, 1, 'no answer within 1 seconds'),
    ('sleep', 0, 1, 'no answer'),
])
def test_a_bad_row_scores_0_is_counted_and_costs_the_others_nothing(
    hostile, what, errors, timeouts, message):
  scores, report = hostile.grade(items('x', what, 'x', 'xx', 'x'))
  np.testing.assert_array_equal(scores['mine'], [1.5, 0, 1.5, 2, 1.5])
  assert (report['errors'], report['timeouts']) == (errors, timeouts)
  assert report['first_error'].startswith("reward 'mine', row 101: ")
  assert message in report['first_error']


def test_many_bad_rows_at_once(hostile):
  clock = time.monotonic()
  scores, report = hostile.grade(
      items('hang', 'die', 'x', 'sleep', 'throw', 'segfault', 'hang', 'die'))
  np.testing.assert_array_equal(scores['mine'], [0, 0, 1.5, 0, 0, 0, 0, 0])
  assert (report['errors'], report['timeouts']) == (4, 3)
  assert 'row 100: no answer' in report['first_error']         # the first row's, whoever was first
  assert time.monotonic() - clock < 30


def test_what_a_verifier_prints_is_not_taken_for_its_answer(hostile):
  scores, report = hostile.grade(items('output'))
  np.testing.assert_array_equal(scores['mine'], [4])
  assert not report['errors']


def test_a_worker_that_died_between_batches_is_replaced_at_nobodys_cost(hostile):
  for w in hostile.workers:
    w.process.kill()
    w.process.wait()
  scores, report = hostile.grade(items('x', 'xx', 'x'))
  np.testing.assert_array_equal(scores['mine'], [1.5, 2, 1.5])
  assert not report['errors']


def test_rows_that_cannot_be_sent_are_errors(hostile):
  bad = [('p', 'x', {'word': lambda: 0}), ('p', 'x', {})]
  scores, report = hostile.grade(bad)
  np.testing.assert_array_equal(scores['mine'], [0, 1.5])
  assert report['errors'] == 1 and 'row 0' in report['first_error']


def test_no_items_no_scores(hostile):
  scores, report = hostile.grade([])
  assert scores['mine'].shape == (0,) and not report['errors']


def test_several_rewards_at_once_in_process_and_out(user_file):
  specs = {'form': 'number', 'right': 'math', 'same': 'exact', 'mine': f'{user_file}:reward'}
  rows = [('p', '#### 1,000', {'answer': '1000'}), ('p', 'die', {'answer': '1'}), ('p', '7', {})]
  with contextlib.closing(pool.Grader(specs, 2, 20.0)) as grader:
    scores, report = grader.grade(rows)
  assert list(scores) == list(specs)
  np.testing.assert_array_equal(scores['form'], [1, 0, 0])
  np.testing.assert_array_equal(scores['right'], [1, 0, 0])
  np.testing.assert_array_equal(scores['same'], [0, 0, 0])
  np.testing.assert_array_equal(scores['mine'], [6, 0, 1.5])
  assert report['errors'] == 3                       # mine dies; math and exact miss the answer


def test_a_hanging_comparison_of_formulas_meets_the_deadline():
  with contextlib.closing(pool.Grader({'m': 'math'}, 1, DEADLINE)) as grader:
    scores, report = grader.grade([('', r, {'answer': '5'}) for r in ('#### 9**9**9**9', '5')])
  np.testing.assert_array_equal(scores['m'], [0, 1])
  assert report['timeouts'] == 1 and report['errors'] == 0


def test_cheap_rewards_need_no_process():
  grader = pool.Grader({'same': 'exact', 'd': 'digits'}, 2, DEADLINE)
  assert not grader.workers
  scores, report = grader.grade([('', '5', {'answer': '5'}), ('', '55', {})])
  np.testing.assert_array_equal(scores['same'], [1, 0])
  np.testing.assert_array_equal(scores['d'], [1, 1])
  assert report['errors'] == 1 and "reward 'same', row 1: KeyError" in report['first_error']


def test_workers_stay_small_and_import_neither_the_script_nor_jax(tmp_path):
  mine = tmp_path / 'mine.py'
  mine.write_text('import os, sys\ndef reward(p, r, row):\n'
                  '  return 7 + ("jax" in sys.modules) '
                  '+ 2 * (os.getenv("JAX_PLATFORMS") != "cpu")\n')
  script = tmp_path / 'script.py'
  script.write_text(textwrap.dedent(f"""
      import sys
      sys.path.insert(0, {str(ROOT)!r})
      print('imported')
      from rl.rewards import pool
      grader = pool.Grader({{'mine': {str(mine) + ':reward'!r}}}, 2, 5.0)
      print(grader.grade([('', '', {{}})])[0]['mine'].tolist(), 'jax' in sys.modules)
  """))
  environment = {k: v for k, v in os.environ.items() if k != 'JAX_PLATFORMS'}
  done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
  assert done.stdout.split('\n') == ['imported', '[7.0] False', ''], done.stderr


def alive(pid):
  try:
    with open(f'/proc/{pid}/stat') as f:
      return f.read().rsplit(')', 1)[1].split()[0] not in 'ZX'
  except FileNotFoundError:
    return False


def wait_until_gone(pids):
  for _ in range(200):
    if not any(map(alive, pids)):
      return True
    time.sleep(0.05)
  return False


def test_workers_end_with_the_grader(user_file):
  grader = pool.Grader({'mine': f'{user_file}:reward'}, 2, DEADLINE)
  pids = [w.process.pid for w in grader.workers]
  assert all(map(alive, pids))
  grader.close()
  grader.close()
  assert wait_until_gone(pids)
  with pytest.raises(ValueError, match='closed'):
    grader.grade(items('x'))


def test_workers_end_with_a_parent_that_is_killed_even_while_they_hang(user_file, tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(textwrap.dedent(f"""
      import sys
      sys.path.insert(0, {str(ROOT)!r})
      from rl.rewards import pool
      grader = pool.Grader({{'mine': {str(user_file) + ':reward'!r}}}, 2, 1000.0)
      print(*[w.process.pid for w in grader.workers], flush=True)
      grader.grade([('', 'hang', {{}})])
  """))
  with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
    pids = [int(x) for x in parent.stdout.readline().split()]
    time.sleep(0.3)
    parent.kill()
  assert len(pids) == 2 and wait_until_gone(pids)


@pytest.mark.parametrize('text, spec, message', [
    ('', 'exakt', "unknown reward 'exakt'; did you mean 'exact'"),
    ('', 'gone.py:reward', 'there is no file'),
    ('def rewrad(p, r, row): return 0', 'f.py:reward', "did you mean 'rewrad'"),
    ('reward = 3', 'f.py:reward', "unknown function 'reward'"),
    ('def reward(p, r) return 0', 'f.py:reward', 'not Python'),
    ('def reward(p, r): return 0', 'f.py:reward', 'must take \\(prompt, response, row\\)'),
    ('def reward(p, r, row, more): return 0', 'f.py:reward', 'must take'),
    ('def reward(p, r, row, *, more): return 0', 'f.py:reward', 'must take'),
])
def test_a_reward_that_is_not_there_is_refused_at_once(tmp_path, text, spec, message):
  (tmp_path / 'f.py').write_text(text)
  full = f'{tmp_path}/{spec}' if ':' in spec else spec
  with pytest.raises(ValueError, match=message):
    rewards.check(full)
  with pytest.raises(ValueError, match=message):
    pool.Grader({'mine': full})


@pytest.mark.parametrize('text', [
    'def reward(p, r, row): return 0',
    'def reward(p, r, row, strict=True, *, more=1): return 0',
    'def reward(*args): return 0',
    'import no_such_module\nraise SystemExit\ndef reward(p, r, row): return 0',
])
def test_a_file_is_only_looked_at(tmp_path, text):
  (tmp_path / 'f.py').write_text(text)
  assert rewards.check(f'{tmp_path}/f.py:reward') == f'{tmp_path / "f.py"}:reward'


@pytest.mark.parametrize('text, message', [
    ('import no_such_module', 'no_such_module'), ('raise SystemExit(4)', 'SystemExit'),
    ('import os; os._exit(4)', 'process ended'),
])
def test_a_file_that_does_not_load_is_one_clear_error(tmp_path, text, message):
  (tmp_path / 'f.py').write_text(f'{text}\ndef reward(p, r, row): return 0')
  with pytest.raises(ValueError, match=f'cannot be loaded.*{message}'):
    pool.Grader({'mine': f'{tmp_path}/f.py:reward'}, 2, DEADLINE)


def test_a_file_may_import_its_neighbours(tmp_path):
  (tmp_path / 'neighbour.py').write_text('VALUE = 4')
  (tmp_path / 'f.py').write_text('import neighbour\ndef reward(p, r, row): return neighbour.VALUE')
  with contextlib.closing(pool.Grader({'mine': f'{tmp_path}/f.py:reward'}, 1, DEADLINE)) as grader:
    np.testing.assert_array_equal(grader.grade(items('x'))[0]['mine'], [4])


def test_a_file_that_stops_loading_in_mid_run_ends_no_run(tmp_path):
  file = tmp_path / 'f.py'
  file.write_text('import os\ndef reward(p, r, row): return os._exit(3) if r == "die" else 1')
  with contextlib.closing(pool.Grader({'mine': f'{file}:reward'}, 1, DEADLINE)) as grader:
    file.write_text('import os; os._exit(4)')
    scores, report = grader.grade(items('x', 'die', 'x', 'x'))
    np.testing.assert_array_equal(scores['mine'], [1, 0, 0, 0])
    assert report['errors'] == 3
    file.write_text('def reward(p, r, row): return 2')
    np.testing.assert_array_equal(grader.grade(items('x', 'x'))[0]['mine'], [2, 2])


@pytest.mark.parametrize('specs, workers, deadline', [({}, 1, 1.0), ({'a': 'exact'}, 0, 1.0),
                                                      ({'a': 'exact'}, 1, 0.0)])
def test_graders_without_sense_are_refused(specs, workers, deadline):
  with pytest.raises(ValueError):
    pool.Grader(specs, workers, deadline)


def test_weights_are_per_component_and_known():
  scores = {'a': np.array([1.0, 2]), 'b': np.array([3.0, 4])}
  weighed = pool.weigh(scores, {'b': 0.5})
  np.testing.assert_array_equal(weighed['a'], [1, 2])
  np.testing.assert_array_equal(weighed['b'], [1.5, 2])
  with pytest.raises(ValueError, match='c'):
    pool.weigh(scores, {'c': 1.0})
