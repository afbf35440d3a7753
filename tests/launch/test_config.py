"""Configs: what files and options may set, what is refused, what a resumed run may change."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import base
from launch import cli, config
from nn.config import MoE
from rl.methods import METHODS

ROOT = str(Path(__file__).resolve().parents[2])
HEAD = 'from configs.base import get_config as base\ndef get_config():\n  c = base()\n'


@pytest.fixture
def file(tmp_path):
  """Writes a config file whose body changes c, and returns its path."""
  def write(body):
    path = tmp_path / 'run.py'
    path.write_text(HEAD + ''.join(f'  {line}\n' for line in body.splitlines()) + '  return c\n')
    return path
  return write


def error(f, *args):
  """The message of the ValueError that the call raises; it must be one line."""
  with pytest.raises(ValueError) as caught:
    f(*args)
  message = str(caught.value)
  assert '\n' not in message
  return message


def set_one(key, text):
  c = base.get_config()
  config.override(c, key, text)
  return c[key]


def test_a_file_anywhere_starts_from_base(file):
  c = config.load(file('''c.rl.steps = 7
c.rl.grpo = dict(clip_high=0.28)
c.rl.dapo.clip_low = 0.1
c.rl.rewards = {'mine': 'rewards.py:score'}
c.sft.optimizer.learning_rate = 1'''))
  assert (c.rl.steps, c.rl.grpo.clip_high, c.rl.dapo.clip_low) == (7, 0.28, 0.1)
  assert c.rl.rewards.mine == 'rewards.py:score'
  assert isinstance(c.sft.optimizer.learning_rate, float)
  assert c.sft.rows == base.get_config().sft.rows


def test_a_loaded_config_is_locked_everywhere(file):
  c = config.load(file('c.rl.grpo = dict(clip_high=0.28)'))
  for block in (c, c.sft.data, c.rl.grpo, c.rl.rewards):
    with pytest.raises(AttributeError):
      block.new = 1


def test_no_default_is_none_and_every_leaf_has_a_plain_type():
  for key, value in config.flat(base.get_config()).items():
    assert type(value) in (bool, int, float, str, tuple), key


def test_base_passes_its_own_check_unchanged():
  c, same = base.get_config(), base.get_config()
  config.check(c, 'base')
  assert config.flat(c) == config.flat(same)


def test_method_names_are_no_keys_of_rl():
  source = inspect.getsource(base.get_config)
  assert not [name for name in METHODS if f'c.rl.{name} =' in source]


@pytest.mark.parametrize('key, text, value', [
    ('rl.steps', '12', 12),
    ('rl.steps', '1_000', 1000),
    ('mesh.data', '-1', -1),
    ('rl.temperature', '1', 1.0),
    ('sft.optimizer.learning_rate', '3e-4', 3e-4),
    ('report', 'false', False),
    ('model.qk_norm', 'True', True),
    ('tokenizer', '12', '12'),
    ('rl.methods', 'grpo,dapo', ('grpo', 'dapo')),
    ('rl.methods', 'grpo', ('grpo',)),
    ('rl.methods', '("a",)', ('a',)),
    ('rl.methods', "['a', 'b']", ('a', 'b')),
    ('rl.stop', '', ()),
    ('sft.data.weights', '3,1', (3.0, 1.0)),
    ('model.pattern', '(("gdn", "moe"), "attention")', (('gdn', 'moe'), 'attention')),
    ('model.pattern', 'gdn,attention', ('gdn', 'attention')),
    ('model.rules.embed', 'fsdp,expert', ('fsdp', 'expert')),
    ('rl.rewards.mine', 'a.py:f', 'a.py:f'),
    ('rl.reward_weights.mine', '2', 2.0),
    ('rl.grpo.clip_high', '0.28', 0.28),
])
def test_overrides_are_read_as_the_type_of_the_default(key, text, value):
  actual = set_one(key, text)
  assert actual == value and type(actual) is type(value)
  assert [type(x) for x in value] == [type(x) for x in actual] if isinstance(value, tuple) else True


@pytest.mark.parametrize('key, text, said', [
    ('rl.stepz', '3', ["'rl.stepz'", "did you mean 'rl.steps'?", 'rl.prompts']),
    ('zzz', '3', ["'zzz'", 'checkpoint']),
    ('optimiser.clip', '1', ["'optimiser'"]),
    ('learning_rate', '1', ['did you mean pretrain.optimizer.learning_rate or rl.']),
    ('rl', '3', ['rl is a block of keys', 'steps']),
    ('rl.steps.more', '3', ['rl.steps is a value']),
    ('rl.steps', '3.0', ["rl.steps is '3.0'", 'whole number']),
    ('rl.steps', 'true', ['whole number']),
    ('rl.temperature', 'hot', ['a number']),
    ('report', '1', ['true or false']),
    ('rl.methods', '(1, 2)', ['tuple of str']),
    ('rl.methods', '("a"', ['tuple of str']),
    ('sft.data.weights', '3,b', ['tuple of float']),
    ('rl.grpo.clip_hihg', '1', ["'clip_hihg'", "did you mean 'clip_high'?"]),
    ('rl.grpo.clip_high', 'x', ['a number']),
    ('rl.reward_weights.mine', 'x', ['a number']),
])
def test_bad_overrides_are_named(key, text, said):
  message = error(set_one, key, text)
  assert message.startswith(f'--config.{key}')
  assert all(part in message for part in said), message


@pytest.mark.parametrize('body, said', [
    ('c.rl.stepz = 3', ['run.py:4: c.rl.stepz = 3', "'stepz'", "did you mean 'steps'?"]),
    ('c.optim.lr = 3', ['run.py:4: c.optim.lr = 3', "'optim'"]),
    ('c.rl.steps = 3.5', ['run.py:4: c.rl.steps = 3.5', 'int']),
    ('c.rl.steps = "3"', ['run.py:4', 'int']),
    ('c.rl.methods = "grpo,dapo"', ['run.py:4', 'tuple']),
    ('c.rl.steps = True', ['rl.steps is True', 'whole number']),
    ('c.rl.steps = None', ['rl.steps is None', 'whole number']),
    ('c.rl.methods = (1,)', ['rl.methods is (1,)', 'tuple of str']),
    ('c.model.pattern = (("gdn", 1),)', ['model.pattern', 'pairs of names']),
    ('c.rl.rewards.mine = 1', ['rl.rewards.mine is 1', 'a string']),
    ('c.rl.grpo.clip_hihg = 1', ["did you mean 'clip_high'?"]),
    ('c.rl.grpo.clip_high = "a"', ['rl.grpo.clip_high', 'a number']),
    ('c.rl.grpo.clip_high = dict(a=1)', ['rl.grpo.clip_high is a block']),
    ('c.sft = dict(steps=3)', ['sft.', 'is missing', 'update()']),
    ('with c.unlocked():\n  c.rl.stepz = 3', ["'rl.stepz'", "did you mean 'rl.steps'?"]),
    ('return 3', ['get_config() returned int']),
    ('1 / 0', ['run.py:4: 1 / 0: ZeroDivisionError']),
    ('import nothing_like_this', ['run.py:4', 'ModuleNotFoundError']),
    ('c.rl.steps = (', ['SyntaxError']),
])
def test_bad_files_are_named_with_the_place(file, body, said):
  path = file(body)
  message = error(config.load, path)
  assert str(path) in message
  assert all(part in message for part in said), message


def test_a_missing_file_names_its_neighbour(file):
  path = file('')
  assert 'did you mean' in error(config.load, path.with_name('runs.py'))
  path.write_text('x = 1')
  assert 'no function get_config' in error(config.load, path)


def test_lists_in_a_file_become_tuples(file):
  c = config.load(file("c.rl.methods = ['grpo']\nc.model.tail = [['gdn', 'moe']]"))
  assert (c.rl.methods, c.model.tail) == (('grpo',), (('gdn', 'moe'),))


def test_whole_numbers_for_floats_become_floats(file):
  c = config.load(file('''c.rl.temperature = 1
c.sft.data.weights = (3, 1)
c.rl.grpo.clip_high = 1'''))
  assert type(c.rl.temperature) is float and type(c.rl.grpo.clip_high) is float
  assert [type(w) for w in c.sft.data.weights] == [float, float]


def test_overrides_come_after_the_file_and_in_order(file):
  path = file('c.seed = 1')
  assert config.load(path, [('seed', '2'), ('seed', '3')]).seed == 3


def test_split_takes_overrides_out_of_a_command_line():
  rest, overrides = config.split([
      '--config', 'a.py', '--config.seed=3', '--workdir=w', '--config.mesh.data', '-1',
      '--config.rl.rewards.mine=a=b'])
  assert rest == ['--config', 'a.py', '--workdir=w']
  assert overrides == [('seed', '3'), ('mesh.data', '-1'), ('rl.rewards.mine', 'a=b')]
  assert '--config.seed has no value' in error(config.split, ['--config.seed', '--workdir=w'])
  assert '--config.seed has no value' in error(config.split, ['--config.seed'])


def test_reads_are_remembered_by_leaf():
  c = base.get_config()
  t = config.Tracked(c)
  assert t.rl.steps == c.rl.steps and t['sft']['rows'] == c.sft.rows
  assert t._read == {'rl.steps', 'sft.rows'}
  assert 'seed' in t and len(t.rl) == len(c.rl) and list(t) == list(c)
  assert t._read == {'rl.steps', 'sft.rows'}                     # asking for names reads nothing
  assert t.mesh.to_dict() == c.mesh.to_dict()
  assert t._read == {'rl.steps', 'sft.rows'} | {f'mesh.{axis}' for axis in c.mesh}
  assert dict(**t.checkpoint) == c.checkpoint.to_dict()
  assert {f'checkpoint.{key}' for key in c.checkpoint} < t._read
  items = dict(t.items())                # leaves of this level, blocks unread
  assert 'seed' in t._read and 'rl.group' not in t._read and items['rl'].group == c.rl.group
  assert 'rl.group' in t._read


def test_a_view_is_read_only_and_knows_what_is_near():
  t = config.Tracked(base.get_config())
  with pytest.raises(AttributeError):
    t.seed = 3
  with pytest.raises(AttributeError, match="did you mean 'rl.steps'"):
    t.rl.stepz  # noqa: B018
  with pytest.raises(KeyError):
    t['zzz']


def read_all(t, skip):
  for key, value in t.items():
    if isinstance(value, config.Tracked) and key not in skip:
      read_all(value, skip)


@pytest.mark.parametrize('body, skip, said', [
    ('c.sft.steps = 3', {'sft'}, ["sft.steps = 3 ('sft' is not among phases ('pretrain',))"]),
    ("c.phases = ('rl',)\nc.rl.dapo.clip_low = 0.1", {'dapo'},
     ['rl.dapo.clip_low = 0.1', 'not among rl.methods']),
    ('c.arithmetic.digits = 3', {'arithmetic'}, ["data.format 'arithmetic'"]),
    ("c.pretrain.data.prompt = 'q'", {'data'}, ["pretrain.data.format 'text' does not use it"]),
    ('c.pretrain.optimizer.decay = 9', {'optimizer'}, ["'adamw' with schedule 'constant'"]),
    ("c.log.wandb = 'x'\nc.eval.rows = 3", {'log', 'eval'},
     ["log.wandb = 'x' (nothing", 'eval.rows = 3']),
])
def test_settings_without_effect_are_refused(file, body, skip, said):
  t = config.Tracked(config.load(file(body)))
  read_all(t, skip)
  message = error(config.check_read, t)
  assert all(part in message for part in said), message


def test_unread_defaults_are_fine_unless_named_on_the_command_line():
  t = config.Tracked(base.get_config())
  config.check_read(t)
  assert 'rl.group = 8' in error(config.check_read, t, ['rl.group'])
  assert t.rl.group == 8
  config.check_read(t, ['rl.group'])


def test_what_a_file_says_can_be_taken_back_on_the_command_line(file):
  path = file('c.rl.optimizer.schedule = "wsd"\nc.rl.optimizer.decay = 9')
  def message(*overrides):
    t = config.Tracked(config.load(path, overrides))
    read_all(t, {'optimizer'})
    assert t.rl.optimizer.schedule == 'constant'
    return error(config.check_read, t, ['rl.optimizer.schedule', 'rl.optimizer.decay'],
                 config.load(path))
  constant = ('rl.optimizer.schedule', 'constant')
  assert 'rl.optimizer.decay = 8' in message(constant, ('rl.optimizer.decay', '8'))
  t = config.Tracked(config.load(path, [constant, ('rl.optimizer.decay', '0')]))
  read_all(t, {'optimizer'})
  assert t.rl.optimizer.schedule == 'constant'
  config.check_read(t, ['rl.optimizer.schedule', 'rl.optimizer.decay'], config.load(path))


def test_other_phases_on_the_command_line_leave_the_file_as_it_is(file):
  path = file('c.phases = ("sft", "rl")\nc.sft.steps = 3\nc.pretrain.steps = 4\nc.seed = 5')
  def message(*overrides):
    t = config.Tracked(config.load(path, overrides))
    explicit = [key for key, _ in overrides]
    return t.seed and error(config.check_read, t, explicit)
  assert 'pretrain.steps = 4' in message() and 'sft.steps = 3' in message()
  t = config.Tracked(config.load(path, [('phases', 'rl')]))
  assert t.seed == 5 and t.phases == ('rl',)
  config.check_read(t, ['phases'])
  assert message(('phases', 'rl'), ('sft.rows', '4')).endswith(
      "sft.rows = 4 ('sft' is not among phases ('rl',))")


def test_json_round_trip(file):
  c = config.load(file('''c.model.pattern = (('gdn', 'moe'), 'attention')
c.rl.grpo.clip_high = 0.28
c.sft.data.weights = (1.0, 3.0)
c.rl.rewards.mine = "é"'''))
  again = config.from_json(config.to_json(c))
  assert config.flat(again) == config.flat(c)
  assert again.is_locked and again.model.pattern == (('gdn', 'moe'), 'attention')
  assert config.diff(config.to_json(c), again) == []


def test_keys_that_came_since_a_config_was_written_have_their_defaults():
  now = base.get_config()
  stored = now.to_dict()
  stored['model']['embed_dim'] = 7
  del stored['model']['moe'], stored['seed'], stored['rl']['optimizer']['warmup']
  again = config.from_json(json.dumps(stored))
  now.model.embed_dim = 7
  assert config.flat(again) == config.flat(now)
  assert config.diff(json.dumps(stored), now) == []
  now.seed = 3
  assert config.diff(json.dumps(stored), now) == [('seed', 0, 3)]


def test_only_the_listed_keys_may_change_on_resume():
  old = config.to_json(base.get_config())
  c = base.get_config()
  for block in (c.pretrain, c.sft, c.rl):
    block.steps += 1
    block.microbatches += 1
  for block in (c.checkpoint, c.eval, c.log):
    block.every += 1
  c.mesh.data, c.mesh.fsdp, c.report = 2, 4, False
  assert config.diff(old, c) == []
  config.check_resume(old, c)
  c.streams, c.rl.group, c.eval.rows, c.rl.grpo.clip_high = 2, 4, 3, 0.28
  assert config.diff(old, c) == [
      ('eval.rows', 512, 3), ('rl.group', 8, 4), ('rl.grpo.clip_high', '(absent)', 0.28),
      ('streams', 1, 2)]
  message = error(config.check_resume, old, c)
  assert 'rl.group was 8 and is now 4' in message and '--allow_config_change' in message


def test_model_config_takes_the_vocabulary_from_the_tokenizer():
  c = base.get_config()
  c.model.repeats = 3
  c.model.rules.embed = ()
  c.model.ffn = 'moe'
  c.model.moe.experts = 16
  cfg = config.model_config(config.Tracked(c).model, 259)
  assert (cfg.vocab_size, cfg.repeats, dict(cfg.rules)['embed']) == (259, 3, ())
  assert cfg.moe == MoE(experts=16)
  assert hash(cfg) == hash(config.model_config(c.model, 259))
  c.model.vocab_size = 320
  assert config.model_config(c.model, 259).vocab_size == 320
  c.model.vocab_size = 258
  assert '258' in error(config.model_config, c.model, 259)


def test_method_options_are_those_that_are_set():
  c = base.get_config()
  c.rl.grpo = {'clip_high': 0.28}
  assert config.method_options(config.Tracked(c).rl) == {'grpo': {'clip_high': 0.28}}


@pytest.mark.parametrize('platforms, flags, arguments, nproc, expected', [
    ('cpu', '', [], None, None),                                            # one device never waits
    ('', '--xla_force_host_platform_device_count=8', [], None, '16'),
    ('cpu', '--xla_force_host_platform_device_count=8', [], '4', '16'),
    ('cpu', '--xla_force_host_platform_device_count=8', [], '64', '64'),
    ('cpu', '--xla_force_host_platform_device_count=32', [], None, '64'),   # two per device
    ('cuda', '--xla_force_host_platform_device_count=8', [], None, None),
    ('cpu', '', ['--num_processes', '2'], None, '16'),
    ('cpu', '', ['--coordinator=auto'], None, '16'),
    ('cpu', '', ['--num_processes=1', '-h'], None, None),
])
def test_threads_are_raised_where_devices_could_wait_for_each_other(
    monkeypatch, platforms, flags, arguments, nproc, expected):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1}, raising=False)
  for name, value in {'JAX_PLATFORMS': platforms, 'XLA_FLAGS': flags, 'NPROC': nproc}.items():
    monkeypatch.delenv(name, raising=False)
    if value is not None:
      monkeypatch.setenv(name, value)
  monkeypatch.delenv('JAX_NUM_PROCESSES', raising=False)
  cli.prepare(arguments)
  assert os.environ.get('NPROC') == expected
  monkeypatch.setenv('NPROC', '')                                           # undone by monkeypatch


def test_machines_with_many_cores_are_left_alone(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(64)), raising=False)
  monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
  monkeypatch.delenv('NPROC')
  cli.prepare([])
  assert 'NPROC' not in os.environ


@pytest.mark.parametrize('raised, flags, status, stderr', [
    ('ValueError("a\\n  b")', [], 2, 'error: a b\n'),
    ('open("/no/such/file")', [], 2, 'error: No such file or directory: /no/such/file\n'),
    ('return 3', [], 3, ''),
    ('ValueError("a")', ['--debug'], 1, 'Traceback'),
    ('KeyError("a")', [], 1, 'Traceback'),
])
def test_a_users_error_is_one_line_and_status_2(raised, flags, status, stderr):
  statement = raised if raised.startswith(('return', 'open')) else f'raise {raised}'
  script = f'from launch import cli\ndef main(arguments):\n  {statement}\ncli.run(main)\n'
  done = subprocess.run([sys.executable, '-c', script, *flags], capture_output=True, text=True,
                        env=os.environ | {'PYTHONPATH': ROOT}, timeout=60)
  assert done.returncode == status
  assert done.stderr == stderr or (stderr == 'Traceback' and done.stderr.startswith(stderr))


@pytest.mark.parametrize('arguments, said', [
    (['--modle', 'x'], "unknown option '--modle'; did you mean '--model'?"),
    (['--model=x', '--stpe=3'], "unknown option '--stpe'; did you mean '--step'?"),
    (['--model', 'x', '--step', 'many'], "argument --step: invalid int value: 'many'; see --help"),
    ([], 'required: --model; see --help'),
    (['--model', 'x', 'y'], 'unrecognized arguments: y'),
])
def test_a_misspelt_option_is_named(arguments, said):
  parser = cli.parser('a command')
  parser.add_argument('--model', required=True)
  parser.add_argument('--step', type=int)
  with pytest.raises(ValueError, match=re.escape(said)):
    parser.parse_args(arguments)
  assert parser.parse_args(['--model', '--step 3', '--debug']).model == '--step 3'
