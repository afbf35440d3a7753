"""Runs in processes of their own: stopped, killed, and two that share a run."""

import contextlib
import random
import re
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

import train_runs

SECONDS = 240              # after which something hangs
STEPS = ('sft.steps=20', 'rl.steps=20', 'checkpoint.every=3', 'eval.every=10')


@contextlib.contextmanager
def processes(*runs):
  """The runs, killed at the end if they have not ended by themselves."""
  try:
    yield runs
  finally:
    for p in runs:
      p.kill()
      p.wait()


def wait_for(condition, process):
  """Returns when the condition holds; the process must not end before."""
  end = time.monotonic() + SECONDS
  while not condition():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < end
    time.sleep(0.001)


def lines(workdir):
  path = Path(workdir) / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run without interruption."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  assert train_runs.run(workdir, *STEPS) == 0
  return workdir


def goes_on(whole, workdir):
  """Ends the run and compares it with the one that was never interrupted."""
  assert train_runs.run(workdir, *STEPS) == 0
  train_runs.assert_same_checkpoint(whole, workdir, 40)
  assert train_runs.logged(workdir) == train_runs.logged(whole)


def test_a_signal_saves_and_ends_well(whole, tmp_path):
  """Also the run that goes on from there."""
  for number in (signal.SIGTERM, signal.SIGINT):
    before = lines(tmp_path)
    with processes(train_runs.start(tmp_path, *STEPS)) as (run,):
      wait_for(lambda: lines(tmp_path) > before + 8, run)
      run.send_signal(number)
      said = run.communicate(timeout=SECONDS)[0]
    assert run.returncode == 0, said
    assert f'{number.name}: saved' in said.splitlines()[-1]
    assert train_runs.steps(tmp_path)[-1] == max(s for _, s in train_runs.logged(tmp_path)) < 40
  goes_on(whole, tmp_path)


def test_a_killed_run_loses_what_it_had_not_saved(whole, tmp_path):
  """Killed while it saves and, as it goes on, at random."""
  partial = lambda: list((tmp_path / 'checkpoints').glob('*tmp*'))
  for while_it_saves in (True, False):
    begun, more = lines(tmp_path), random.randrange(5, 15)
    print(f'to be killed {more} lines after line {begun}')     # seen if the test fails
    with processes(train_runs.start(tmp_path, *STEPS)) as (run,):
      wait_for(lambda: lines(tmp_path) > begun + more, run)
      if while_it_saves:
        wait_for(partial, run)
      run.kill()
      run.wait()
    saved, logged = train_runs.steps(tmp_path), [s for _, s in train_runs.logged(tmp_path)]
    # Step n is logged while n + 1 runs; of the steps saved before, one may still have been written.
    assert max(logged) - max([0, *saved]) <= 2 * 3 + 1, (saved, max(logged))
  goes_on(whole, tmp_path)


def port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def two(workdir, *overrides):
  """Starts two processes with two devices each."""
  flags = ('--coordinator', f'127.0.0.1:{port()}', '--num_processes', '2')
  return [train_runs.start(workdir, *overrides, 'mesh.data=4', devices=2,
                           flags=(*flags, '--process_id', str(i))) for i in range(2)]


def ended_well(runs):
  """What the processes said, when all have ended with status 0."""
  said = [p.communicate(timeout=SECONDS)[0] for p in runs]
  assert [p.returncode for p in runs] == [0] * len(runs), '\n'.join(said)
  return said


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
  """(overrides, workdir of one device, workdir of two processes): pretraining, then GRPO."""
  folder = tmp_path_factory.mktemp('shared')
  overrides = (
      'phases=pretrain,rl', 'streams=2', 'pretrain.steps=4',
      *train_runs.pretraining(folder), 'pretrain.data.heldout=0.2', 'arithmetic.demos=0')
  assert train_runs.run(folder / 'one', *overrides) == 0
  with processes(*two(folder / 'two', *overrides)) as runs:
    said = ended_well(runs)
  assert 'rl 8/8' in said[0] and 'loss' not in said[1]     # one process speaks
  return overrides, folder / 'one', folder / 'two'


def assert_same_run(a, b):
  """To rounding: other reductions over other devices. Rewards are of the same samples.

  b may have gone on.
  """
  for evaluations in (False, True):
    left, right = (train_runs.logged(x, evaluations) for x in (a, b))
    assert list(left) == [(phase, step) for phase, step in right if step <= 8]
    for key, values in left.items():
      assert values.keys() == right[key].keys()
      for name, value in values.items():
        tolerance = 1e-5 if not re.match('parity|policy/kl|kl', name) else 1e-6
        np.testing.assert_allclose(
            right[key][name], value, rtol=1e-4, atol=tolerance, err_msg=f'{key} {name}')
  left, right = (train_runs.state(x, 8) for x in (a, b))
  for name, x in left.items():
    np.testing.assert_allclose(right[name], x, rtol=1e-3, atol=1e-5, err_msg=name)


def test_two_processes_are_one_run(shared):
  _, one, both = shared
  assert train_runs.steps(both) == train_runs.steps(one) == [2, 4, 6, 8]
  assert_same_run(one, both)


@pytest.mark.parametrize('step', [2, 6])
def test_one_process_goes_on_where_two_were(shared, tmp_path, step):
  overrides, one, both = shared
  again = train_runs.rewound(both, step, tmp_path / 'again')
  assert train_runs.run(again, *overrides) == 0
  assert_same_run(one, again)


def test_two_processes_go_on_where_one_was_and_a_signal_to_one_stops_both(shared, tmp_path):
  overrides, one, _ = shared
  again = train_runs.rewound(one, 2, tmp_path / 'again')
  last = lambda: max(step for _, step in train_runs.logged(again))
  with processes(*two(again, *overrides, 'rl.steps=400')) as runs:
    wait_for(lambda: last() > 8, runs[0])
    runs[1].send_signal(signal.SIGTERM)
    said = ended_well(runs)
  assert 'a signal to another process: saved; run the same command' in said[0]
  assert train_runs.steps(again)[-1] == last() < 400
  assert_same_run(one, again)
