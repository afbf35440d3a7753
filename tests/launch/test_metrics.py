"""What a run says can be read back, survives a kill, and fits on the line."""

import io
import json
import math
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from launch import metrics
from launch.metrics import Logger


class Terminal(io.StringIO):
  def isatty(self):
    return True


class Clock:
  """Seconds that pass only when told."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    monkeypatch.setattr(metrics.time, 'monotonic', lambda: self.now)


def quiet(workdir, **options):
  return Logger(workdir, total_steps=100, **{'console': False, 'tensorboard': False, **options})


def lines(workdir, name=metrics.METRICS):
  return (workdir / name).read_text().splitlines()


def test_a_line_is_an_object_with_step_time_phase_and_values(tmp_path):
  with quiet(tmp_path) as logger:
    logger.log(3, {'loss': jnp.float32(0.5), 'reward/exact': np.float64(1), 'n': 2}, phase='rl')
    logger.log(4, {'loss': 0.25})
    on_disk = [json.loads(line) for line in lines(tmp_path)]     # before it is closed
  assert on_disk[0] == {'step': 3, 'time': on_disk[0]['time'], 'phase': 'rl', 'loss': 0.5,
                        'reward/exact': 1.0, 'n': 2.0}
  assert on_disk[1] == {'step': 4, 'time': on_disk[1]['time'], 'loss': 0.25}
  assert abs(on_disk[0]['time'] - os.path.getmtime(tmp_path / metrics.METRICS)) < 60
  assert metrics.read_metrics(tmp_path) == on_disk


def test_numbers_that_are_not_finite_stay_json(tmp_path):
  with quiet(tmp_path) as logger:
    logger.log(1, {'a': math.nan, 'b': math.inf, 'c': -math.inf}, phase='nan')
    logger.samples(1, [{'reward': np.float32('nan'), 'parts': [math.inf, {'x': None}]}])
  refuse = lambda constant: pytest.fail(f'{constant} is not JSON')
  found = json.loads(lines(tmp_path)[0], parse_constant=refuse)
  assert (found['a'], found['b'], found['c']) == ('nan', 'inf', '-inf')
  (read,) = metrics.read_metrics(tmp_path)
  assert math.isnan(read['a']) and read['b'] == math.inf and read['c'] == -math.inf
  assert read['phase'] == 'nan'
  sample = json.loads(lines(tmp_path, metrics.SAMPLES)[0], parse_constant=refuse)
  assert sample['reward'] == 'nan' and sample['parts'] == ['inf', {'x': None}]


@pytest.mark.parametrize('resumed, kept', [(0, []), (2, [0, 1, 2, 2]), (9, [0, 1, 2, 2, 3])])
def test_a_run_that_goes_on_cuts_what_it_will_say_again(tmp_path, resumed, kept):
  with quiet(tmp_path) as logger:
    for at in (0, 1, 2, 2, 3):
      logger.log(at, {'loss': at})
      logger.samples(at, [{'response': str(at)}])
      logger.warn(at, f'at {at}')
  with quiet(tmp_path, resumed=resumed) as logger:
    logger.log(7, {'loss': 7})
  assert [x['step'] for x in metrics.read_metrics(tmp_path)] == kept + [7]
  for name in (metrics.SAMPLES, metrics.WARNINGS):
    assert [x['step'] for x in metrics.read_lines(tmp_path / name)] == kept
  assert not list(tmp_path.glob('*.new'))


@pytest.mark.parametrize('rest, read', [('{"step": 2, "ti', [1]), ('{"step": 2}', [1, 2])])
def test_a_line_cut_short_is_passed_over_and_removed_on_resume(tmp_path, rest, read):
  (tmp_path / metrics.METRICS).write_text('{"step": 1, "time": 0, "loss": 1.0}\n' + rest)
  assert [x['step'] for x in metrics.read_metrics(tmp_path)] == read
  with quiet(tmp_path, resumed=5) as logger:
    logger.log(2, {'loss': 2})
  assert [x['step'] for x in metrics.read_metrics(tmp_path)] == [1, 2]


def test_another_broken_line_is_named(tmp_path):
  for broken in ('broken', '[1]', '{"loss": 1}'):
    (tmp_path / metrics.METRICS).write_text('{"step": 1}\n' + broken + '\n{"step": 2}\n')
    with pytest.raises(ValueError) as error:
      metrics.read_metrics(tmp_path)
    assert f'metrics.jsonl, line 2: no JSON object with a step: {broken}' in str(error.value)
  assert metrics.read_metrics(tmp_path / 'nowhere') == []


def test_cutting_is_all_or_nothing(tmp_path, monkeypatch):
  with quiet(tmp_path) as logger:
    logger.log(1, {'loss': 1})
    logger.log(2, {'loss': 2})
  before = lines(tmp_path)

  def killed(*args):
    raise KeyboardInterrupt
  monkeypatch.setattr(metrics.os, 'replace', killed)
  with pytest.raises(KeyboardInterrupt):
    quiet(tmp_path, resumed=1)
  assert lines(tmp_path) == before


@pytest.mark.parametrize('call, what', [
    (lambda x: x.log(1, {'step': 1}), "cannot be called \\['step'\\]"),
    (lambda x: x.samples(1, [{'time': 1}]), "cannot be called \\['time'\\]"),
    (lambda x: x.log(1, {'loss': np.zeros(2)}), 'metric loss is'),
    (lambda x: x.log(1, {'mfu': None}), 'metric mfu is None'),
    (lambda x: x.samples(1, [{'a': {1}}]), 'a set cannot be logged')])
def test_what_cannot_be_logged(tmp_path, call, what):
  with quiet(tmp_path) as logger, pytest.raises(ValueError, match=what):
    call(logger)


def test_only_process_0_says_anything(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  stream = Terminal()
  with Logger(tmp_path / 'run', total_steps=3, stream=stream, wandb='project') as logger:
    logger.log(1, {'loss': 1})
    logger.samples(1, [{'response': ''}])
    logger.warn(1, 'x')
    logger.say('x')
    logger.summary([('a', 'b')])
  assert stream.getvalue() == '' and not (tmp_path / 'run').exists()


def tensorboard_events(path):
  """Records are: length, 8 bytes; checksum, 4; event; checksum, 4."""
  data = path.read_bytes()
  while data:
    size = int.from_bytes(data[:8], 'little')
    yield event_pb2.Event.FromString(data[12:12 + size])
    data = data[16 + size:]


def test_tensorboard_files_hold_the_numbers(tmp_path):
  with quiet(tmp_path, tensorboard=True) as logger:
    logger.log(1, {'eval/accuracy': 0.5})
  with quiet(tmp_path, tensorboard=True, resumed=1) as logger:
    logger.log(2, {'eval/accuracy': 0.75})
  files = sorted((tmp_path / 'tensorboard').iterdir(), key=lambda p: p.stat().st_mtime_ns)
  events = [event for file in files for event in tensorboard_events(file)]
  scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
  assert scalars == [(1, 'eval/accuracy', 0.5), (2, 'eval/accuracy', 0.75)]
  # TensorBoard drops what an earlier file says from this step on.
  assert [e.step for e in events if e.HasField('session_log')] == [0, 2]


def test_wandb_is_only_imported_when_asked_for(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)                # as if not installed
  quiet(tmp_path).close()
  with pytest.raises(ValueError, match='pip install wandb'):
    quiet(tmp_path, wandb='project')


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
  calls = []
  run = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)),
                              finish=lambda: calls.append('finish'))
  module = types.ModuleType('wandb')
  module.init = lambda **options: calls.append(options) or run
  monkeypatch.setitem(sys.modules, 'wandb', module)
  for step in (1, 2):
    with quiet(tmp_path, wandb='project', resumed=step - 1) as logger:
      logger.log(step, {'loss': 0.5}, phase='sft')
  start, log, finish, again, *_ = calls
  assert start['project'] == 'project' and start['resume'] == 'allow' and len(start['id']) == 12
  assert again['id'] == start['id']
  assert log == (1, {'loss': 0.5, 'phase': 'sft'}) and finish == 'finish'


def test_the_live_line_shows_where_the_run_is(tmp_path, monkeypatch):
  monkeypatch.setenv('COLUMNS', '200')
  clock, stream = Clock(monkeypatch), Terminal()
  logger = Logger(tmp_path, total_steps=500, tensorboard=False, stream=stream)
  logger.log(100, {'reward': 0.25, 'loss': 0.1}, phase='rl')
  clock.now += 20
  logger.log(110, {'reward': 0.5, 'loss': 0.1, 'tokens_per_second': 12345.0, 'mfu': 0.412}, 'rl')
  first, second = stream.getvalue().split('\r')[1:]
  assert first == 'rl 100/500  reward 0.25'
  # 10 steps took 20 seconds, 390 are left
  assert second == 'rl 110/500  reward 0.5  12.3k tokens/s  MFU 41.2%  ETA 13m 00s'
  logger.log(111, {'loss': 0.1}, phase='rl')                     # shorter: the rest is wiped
  assert len(stream.getvalue().split('\r')[-1]) == len(second)
  logger.log(112, {'reward': 0.5, 'eval/accuracy': 0.625, 'eval/problems': 512}, phase='rl')
  assert 'reward 0.5  eval accuracy 0.625  ETA' in stream.getvalue().split('\r')[-1]
  assert stream.getvalue().endswith('\n')                        # stays
  logger.close()


@pytest.mark.parametrize('columns', [60, 40, 10, 1])
def test_the_live_line_never_wraps(tmp_path, monkeypatch, columns):
  monkeypatch.setenv('COLUMNS', str(columns))
  clock, stream = Clock(monkeypatch), Terminal()
  with Logger(tmp_path, total_steps=500, tensorboard=False, stream=stream) as logger:
    for step in range(3):
      clock.now += 1
      logger.log(step, {'reward': 1 / 3, 'tokens_per_second': 1e5, 'mfu': 0.5}, phase='pretrain')
  shown = [line.rstrip() for line in stream.getvalue().split('\r')[1:]]
  assert all(len(line) < max(columns, 1) or line == '' for line in shown)
  if columns == 40:
    assert shown[-1] == 'pretrain 2/500  reward 0.3333'      # whole parts only


def test_without_a_terminal_a_line_every_five_seconds(tmp_path, monkeypatch):
  clock, stream = Clock(monkeypatch), io.StringIO()
  logger = Logger(tmp_path, total_steps=20, tensorboard=False, stream=stream)
  for step in range(1, 21):
    clock.now += 2
    phase = 'sft' if step <= 8 else 'rl'
    logger.log(step, {'loss': step, **({'eval/loss': 0.5} if step == 5 else {})}, phase=phase)
  logger.close()
  said = [line.split('  ')[0] for line in stream.getvalue().splitlines()]
  # The first, 5 seconds later, an evaluation, 5 seconds later; a new phase and so on; the last.
  assert said == ['sft 1/20', 'sft 4/20', 'sft 5/20', 'sft 8/20', 'rl 9/20', 'rl 12/20', 'rl 15/20',
                  'rl 18/20', 'rl 20/20']
  assert '\r' not in stream.getvalue()


def test_the_time_left_is_that_of_the_phase(tmp_path, monkeypatch):
  clock, stream = Clock(monkeypatch), io.StringIO()
  logger = Logger(tmp_path, total_steps=30, tensorboard=False, stream=stream,
                  phase_ends={'sft': 10, 'rl': 30})
  for step in range(1, 13):
    clock.now += 5 if step <= 10 else 60                         # steps of the second are slower
    logger.log(step, {'loss': 1}, phase='sft' if step <= 10 else 'rl')
  logger.close()
  said = stream.getvalue().splitlines()
  assert said[4] == 'sft 5/10  loss 1  ETA 25s'
  assert said[9] == 'sft 10/10  loss 1'
  assert said[10] == 'rl 11/30  loss 1' and said[11] == 'rl 12/30  loss 1  ETA 18m 00s'


def test_words_do_not_break_the_live_line(tmp_path, monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')
  stream = Terminal()
  logger = Logger(tmp_path, total_steps=5, tensorboard=False, stream=stream)
  logger.log(1, {'loss': 1})
  logger.warn(1, 'two rows skipped')
  logger.say('saved')
  screen = ['']
  for char in stream.getvalue():                                 # what a terminal would show
    if char == '\n':
      screen.append('')
      column = 0
    elif char == '\r':
      column = 0
    else:
      screen[-1] = screen[-1][:column] + char + screen[-1][column + 1:]
      column += 1
  assert [line.rstrip() for line in screen] == [
      'warning, step 1: two rows skipped', 'saved', '1/5  loss 1']
  logger.close()
  assert metrics.read_lines(tmp_path / metrics.WARNINGS)[0]['text'] == 'two rows skipped'


def test_peak_flops_are_known_or_0():
  chip = lambda kind: types.SimpleNamespace(device_kind=kind)
  assert metrics.peak_flops([chip('TPU v5 lite')] * 8) == 8 * 197e12
  assert metrics.peak_flops([chip('TPU v4'), chip('unheard of')]) == 0
  assert metrics.peak_flops(jax.devices()) == 0


def test_the_summary_is_a_table():
  text = metrics.table([('mesh', 'data 8'), ('parameters', 'word ' * 12), ('none', '')], 41)
  assert text.splitlines() == [
      'mesh        data 8',
      'parameters  word word word word word',
      '            word word word word word',
      '            word word',
      'none']


@pytest.mark.parametrize('seconds, text', [
    (0.4, '0s'), (59.4, '59s'), (59.6, '1m 00s'), (3599, '59m 59s'), (3725, '1h 02m'),
    (90000, '25h 00m')])
def test_durations(seconds, text):
  assert metrics.duration(seconds) == text


@pytest.mark.parametrize('number, text', [
    (0.5, '0.5'), (999, '999'), (1234567, '1.23M'), (-2e3, '-2k')])
def test_short_numbers(number, text):
  assert metrics.short(number) == text
