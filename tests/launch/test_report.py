"""The page about runs: complete, self-contained, escaped, and right about first, last and best."""

import html.parser
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch import history, metrics, report
from launch.metrics import Logger

SCRIPT = str(Path(__file__).resolve().parents[2] / 'launch' / 'report.py')
EVALS = {0: (0.25, 2.0), 10: (0.75, 1.5), 20: (0.5, 1.75)}       # step: accuracy, loss


def log(workdir, *, steps=20, config=None, scale=1.0,
        phase=lambda step: 'sft' if step < 10 else 'rl'):
  """A small run of two phases, evaluated three times."""
  with Logger(workdir, total_steps=steps, console=False, tensorboard=False) as logger:
    for step in range(steps + 1):
      if step in EVALS:
        accuracy, loss = EVALS[step]
        values = {'eval/accuracy': scale * accuracy, 'eval/loss': loss, 'eval/problems': 512}
        logger.log(step, values, phase=phase(step))
      values = {'loss': 1 / (step + 1), 'odd/number': step % 3, 'limit': 7}
      logger.log(step, values, phase=phase(step))
  if config is not None:
    (workdir / history.CONFIG).write_text(json.dumps(config))
  return workdir


def write(workdir, *lines):
  workdir.mkdir(exist_ok=True)
  (workdir / metrics.METRICS).write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return workdir


class Page(html.parser.HTMLParser):
  """Checks that tags are closed in order, and collects tags, attributes and text."""
  EMPTY = {'meta', 'br', 'path', 'rect', 'use', 'g'}             # g: <g/> in SVG

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.texts, self.cells = [], [], [], [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag != 'meta':
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)
    if self.open[-1:] == ['td']:
      self.cells.append(data)


def page(*workdirs):
  return Page(report.compose(history.load(workdirs)))


def test_the_page_needs_nothing_but_itself(tmp_path):
  text = report.build([log(tmp_path / 'run', config={'a': 1})]).read_text()
  found = Page(text)
  assert 'script' not in found.tags and 'link' not in found.tags and 'img' not in found.tags
  assert all(value.startswith('#') for name, value in found.attributes if 'href' in name)
  assert not [name for name, _ in found.attributes if name == 'src' or name.startswith('on')]
  assert "default-src 'none'" in text and '@import' not in text
  assert not re.search(r'https?:|url\((?!#)', text)


def test_what_runs_say_is_escaped(tmp_path):
  evil = '<script>alert("x")</script>&amp;'
  workdir = tmp_path / '<b>run'
  with Logger(workdir, total_steps=1, console=False, tensorboard=False) as logger:
    logger.log(0, {f'{evil}/a': 1, 'loss': 1}, phase=evil)
    logger.log(1, {f'{evil}/a': 2, 'loss': 1}, phase=evil + '2')
    response = evil + '\x00\x1b\ud800'
    logger.samples(1, [{'prompt': evil, 'response': response, 'reward': evil, evil: evil}])
    logger.warn(1, evil)
  (workdir / history.CONFIG).write_text(json.dumps({evil: evil}))
  for output in (None, tmp_path / 'other.html'):
    text = report.build([workdir, *([log(tmp_path / 'b')] if output else [])], output).read_text()
    found = Page(text)
    assert 'script' not in found.tags and 'b' in found.tags
    assert '<script' not in text and '<b>run' not in text
    assert sum(evil in piece for piece in found.texts) >= 6
    assert '\x00' not in text and '\x1b' not in text


@pytest.mark.parametrize('number', [1, 2])
def test_every_metric_is_on_the_page_once(tmp_path, number):
  workdirs = [log(tmp_path / str(i)) for i in range(number)]
  runs = history.load(workdirs)
  drawn = [name for _, names in report.groups(runs) for name in names]
  still = [name for name, _ in report.unchanged(runs)]
  assert sorted(drawn) == ['eval/accuracy', 'eval/loss', 'loss', 'odd/number']
  assert still == ['eval/problems', 'limit']
  found = page(*workdirs)
  assert found.tags.count('svg') == len(report.groups(runs)) == (3 if number == 1 else 4)
  assert 'odd/number' in found.texts and 'limit' in found.cells and '7' in found.cells


def test_known_metrics_have_their_place():
  names = ['reward', 'reward/exact', 'eval/pass@8', 'kl', 'entropy', 'response_length', 'grad_norm',
           'policy/clip_fraction', 'policy/kl_from_old', 'parity', 'parity/max', 'truncated',
           'groups_with_signal', 'mfu', 'tokens_per_second', 'learning_rate', 'time/collect',
           'accuracy']
  values = {name: (np.arange(2), np.arange(2.0), ['', '']) for name in names}
  run = history.Run('run', Path(), [{'step': 0}], values, [], [], [], {})
  other = [names for chart, names in report.groups([run]) if chart.section == 'Other']
  assert other == [['accuracy']]


def test_first_last_and_best_by_hand(tmp_path):
  workdir = log(tmp_path / 'run')
  assert report.comparison(history.load([workdir])) == [
      ['phase', 'number', 'first', 'last', 'best'],
      ['sft', 'eval/accuracy', '0.25 @0', '0.25 @0', '0.25 @0'],
      ['sft', 'eval/loss', '2 @0', '2 @0', '2 @0'],
      ['rl', 'eval/accuracy', '0.75 @10', '0.5 @20', '0.75 @10'],
      ['rl', 'eval/loss', '1.5 @10', '1.75 @20', '1.5 @10']]
  assert report.before_after([workdir]).splitlines()[:3] == [
      'phase  number         first     last      best',
      '----------------------------------------------',
      'sft    eval/accuracy  0.25 @0   0.25 @0   0.25 @0']


def test_several_runs_side_by_side(tmp_path):
  one = lambda step: ''
  a, b = log(tmp_path / 'a', phase=one), log(tmp_path / 'b', phase=one, scale=0.5)
  c = write(tmp_path / 'c', {'step': 1, 'eval/accuracy': 'nan', 'eval/loss': 2},
            {'step': 2, 'eval/other': 3, 'eval/loss': 1})
  assert report.comparison(history.load([a, b, c])) == [
      ['number', 'a', 'b', 'c'],
      ['eval/accuracy', '0.25 → 0.5, best 0.75 @10', '0.125 → 0.25, best 0.375 @10', '–'],
      ['eval/other', '–', '–', '3 → 3'],
      ['eval/loss', '2 → 1.75, best 1.5 @10', '2 → 1.75, best 1.5 @10', '2 → 1']]


def test_without_evaluations_reward_and_loss_are_compared(tmp_path):
  workdir = write(tmp_path / 'run', *({'step': i, 'loss': 2.0, 'reward': 1.0} for i in range(5)))
  assert report.comparison(history.load([workdir])) == [
      ['number', 'first', 'last', 'best'],
      ['reward (smoothed)', '1 @0', '1 @4', '1 @0'],
      ['loss (smoothed)', '2 @0', '2 @4', '2 @0']]


def test_phases_begin_where_the_one_before_ended(tmp_path):
  (run,) = history.load([log(tmp_path / 'run')])
  assert run.phases == [history.Span('sft', 0, 9), history.Span('rl', 9, 20)]
  ends = [(s.steps[0], s.steps[-1]) for s in report.pieces(run, 'loss', 0, True)]
  assert ends == [(0, 9), (10, 20)]


def test_phases_are_shaded_if_all_runs_share_them_and_marked_if_not(tmp_path):
  a = log(tmp_path / 'a')
  longer = log(tmp_path / 'longer', steps=30)
  other = log(tmp_path / 'other', phase=lambda step: 'sft' if step < 5 else 'rl')
  shorter = log(tmp_path / 'shorter', steps=5)
  spans = [history.Span('sft', 0, 9), history.Span('rl', 9, 30)]
  assert report.shared_phases(history.load([a, longer, shorter])) == (spans, [])
  assert report.shared_phases(history.load([a, other])) == ([], [(0, 0), (9, 0), (0, 1), (4, 1)])


def test_best_and_worst_samples_from_first_to_last_step(tmp_path):
  workdir = write(tmp_path / 'run', {'step': 1, 'loss': 1})
  rows = [{'step': step, 'response': str(reward), 'reward': reward}
          for step in range(20) for reward in (0.5, 'nan', step + 1.0, -1.0, None)]
  rows += [{'step': 30, 'response': 'only'}]
  (workdir / metrics.SAMPLES).write_text(''.join(json.dumps(row) + '\n' for row in rows))
  (run,) = history.load([workdir])
  picked = report.picked_samples(run)
  assert [step for step, _ in picked] == [0, 4, 8, 12, 16, 30]
  for step, entries in picked[:-1]:
    assert [(kind, s['reward']) for kind, s in entries] == [('best', step + 1.0), ('worst', -1.0)]
  assert [(kind, s['response']) for kind, s in picked[-1][1]] == [('', 'only')]
  assert 'only' in page(workdir).texts
  assert 'only' in page(log(tmp_path / 'other'), workdir).texts


def test_what_went_wrong_is_listed(tmp_path):
  workdir = write(
      tmp_path / 'run', {'step': 1, 'loss': 1.0, 'verifier_errors': 0, 'verifier_timeouts': 0},
      {'step': 2, 'loss': 'nan', 'verifier_errors': 3, 'verifier_timeouts': 0},
      {'step': 3, 'loss': 'inf', 'verifier_errors': 1, 'verifier_timeouts': 0, 'nonfinite': 1})
  (workdir / metrics.WARNINGS).write_text('{"step": 1, "time": 0, "text": "2 rows skipped"}\n')
  (workdir / 'bad_batch_3_process_0.npz').touch()
  (run,) = history.load([workdir])
  assert run.warnings == [
      (-1, 'a batch whose loss or gradient was not finite is in bad_batch_3_process_0.npz'),
      (1, '2 rows skipped'),
      (2, 'loss was not finite in 2 of 3 logged steps'),
      (2, 'verifier_errors: 4, in 2 of 3 logged steps'),
      (3, 'nonfinite: 1, in 1 of 1 logged steps')]
  assert 'step 1: 2 rows skipped' in page(workdir).texts


def test_a_number_that_never_was_one_is_only_a_warning(tmp_path):
  workdir = write(tmp_path / 'run', *({'step': i, 'a': 'nan', 'b': i} for i in range(2)))
  (run,) = history.load([workdir])
  assert [names for _, names in report.groups([run])] == [['b']]
  assert page(workdir).tags.count('svg') == 1 and len(run.warnings) == 1


def test_only_settings_that_differ_are_compared(tmp_path):
  a = log(tmp_path / 'a', config={'seed': 0, 'rl': {'steps': 4, 'group': 8}, 'same': [1, 2]})
  b = log(tmp_path / 'b', config={'seed': 1, 'rl': {'steps': 4}, 'same': [1, 2]})
  assert report.differences(history.load([a, b])) == [
      ['setting', 'a', 'b'], ['rl.group', '8', '–'], ['seed', '0', '1']]
  assert report.differences(history.load([a])) == []


def test_runs_of_one_name_are_told_apart(tmp_path):
  for parent in ('x', 'y'):
    (tmp_path / parent).mkdir()
    log(tmp_path / parent / 'run')
  runs = history.load([tmp_path / 'x/run', tmp_path / 'y/run'])
  assert [run.name for run in runs] == ['x/run', 'y/run']
  with pytest.raises(ValueError, match='given twice'):
    history.load([tmp_path / 'x/run', tmp_path / 'x/../x/run'])


def test_what_is_no_run(tmp_path):
  with pytest.raises(ValueError, match='is no workdir: it has no metrics.jsonl'):
    report.build([tmp_path])
  (tmp_path / metrics.METRICS).write_text('')
  with pytest.raises(ValueError, match='metrics.jsonl is empty'):
    report.build([tmp_path])
  (tmp_path / metrics.METRICS).write_text('{"step": 1, "lo')        # killed in its first line
  with pytest.raises(ValueError, match='metrics.jsonl is empty'):
    report.build([tmp_path])
  log(tmp_path)
  (tmp_path / history.CONFIG).write_text('{')
  with pytest.raises(ValueError, match='config.json is not JSON'):
    report.build([tmp_path])
  with pytest.raises(ValueError, match='at least one workdir'):
    report.build([])


def test_the_headline_is_of_the_last_phase(tmp_path):
  (run,) = history.load([log(tmp_path / 'run')])
  assert report.cards(run)[:2] == [('Held-out accuracy', '50.0%', 'from 75.0% in rl'),
                                   ('Held-out loss', '1.75', 'from 1.5 in rl')]


def test_the_command_needs_no_jax(tmp_path):
  """And says where the page is, or what is wrong in one line."""
  workdir = log(tmp_path / 'run')
  program = ('import sys, runpy; sys.modules.update(jax=None, jaxlib=None, flax=None, orbax=None); '
             f'sys.argv = sys.argv[1:]; runpy.run_path({SCRIPT!r}, run_name="__main__")')
  command = [sys.executable, '-c', program, 'report.py']
  done = subprocess.run([*command, str(workdir), '--output', str(tmp_path / 'new' / 'page.html')],
                        capture_output=True, text=True, timeout=120, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert done.stdout == f'report: {tmp_path / "new" / "page.html"}\n'
  Page((tmp_path / 'new' / 'page.html').read_text())
  done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=120)
  assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'is no workdir' in done.stderr


def test_where_the_page_goes(tmp_path, monkeypatch):
  a, b = log(tmp_path / 'a'), log(tmp_path / 'b')
  monkeypatch.chdir(tmp_path)
  assert report.build([a]) == a / 'report.html'
  assert report.build([a, b]) == Path('report.html') and (tmp_path / 'report.html').exists()


def test_directions():
  assert [report.direction(name) for name in (
      'eval/accuracy', 'eval/pass@8', 'eval/loss', 'eval/truncated', 'eval/response_length')] == [
          1, 1, -1, -1, 0]
  assert math.prod(report.direction(n) for n in ('reward', 'kl', 'loss')) == 1
