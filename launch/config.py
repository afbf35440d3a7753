"""From a config file and command-line overrides to one checked config, and what is done with it.

A key is the dotted path of a leaf ('rl.optimizer.learning_rate'); blocks are the ConfigDicts
between.
"""

import ast
import difflib
import functools
import json
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import base
from nn import config as model_lib
from nn.config import RULES, ModelConfig
from rl import methods, names
from rl.methods import METHODS

PHASES = ('pretrain', 'sft', 'rl')

# What a resumed run may change; any other difference makes it another run.
MAY_CHANGE = re.compile(
    r'(pretrain|sft|rl)\.(steps|microbatches)|(checkpoint|eval|log)\.every|report|export|mesh\.\w+')

ABSENT = '(absent)'


def split(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """Takes `--config.a.b=v` and `--config.a.b v` out of a command line.

  Returns:
    The other arguments, and the overrides as (key, text).
  """
  rest, overrides, left = [], [], list(arguments)
  while left:
    argument = left.pop(0)
    if not argument.startswith('--config.'):
      rest.append(argument)
      continue
    key, equals, text = argument.removeprefix('--config.').partition('=')
    if not equals:
      if not left or left[0].startswith('--'):
        raise ValueError(f'--config.{key} has no value; write --config.{key}=VALUE')
      text = left.pop(0)
    overrides.append((key, text))
  return rest, overrides


def load(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
  """Runs the file's get_config(), checks every key and type, and applies the overrides in order.

  Args:
    path: of a Python file with a function get_config() -> ConfigDict, anywhere.
    overrides: (key, text); the text is read as the type of the key's default.

  Raises:
    ValueError: one line that names the file or option, the key, and what was wanted.
  """
  config = run_file(Path(path))
  check(config, str(path))
  for key, text in overrides:
    override(config, key, text)
  return config.unlock().lock()          # lock alone would stop at blocks that are locked already


def run_file(path: Path) -> ConfigDict:
  """What a file's get_config() returns; what it raises becomes one line, with the place."""
  if not path.is_file():
    there = [str(p) for p in path.parent.glob('*.py')] if path.parent.is_dir() else []
    raise ValueError(names.unknown('config file', str(path), there))
  namespace = {'__name__': 'run_config', '__file__': str(path)}
  try:
    exec(compile(path.read_text(), str(path), 'exec'), namespace)
    if not callable(namespace.get('get_config')):
      raise ValueError('there is no function get_config()')
    config = namespace['get_config']()
  except Exception as error:
    raise ValueError(explain(path, error)) from error
  if not isinstance(config, ConfigDict):
    raise ValueError(f'{path}: get_config() returned {type(config).__name__}, wanted a ConfigDict')
  return config


def explain(path: Path, error: Exception) -> str:
  """One line for what a config file raised: the place, the code there, the reason."""
  frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
  place = f'{path}:{frames[-1].lineno}: {frames[-1].line}: ' if frames else f'{path}: '
  if isinstance(error, AttributeError) and isinstance(error.args[0], KeyError):
    # An unknown key, as ml_collections reports it: with the values of its whole block.
    key = re.search(r'["\'](\w+)["\']', str(error.args[0].args[0])).group(1)
    known = {part for full in flat(base.get_config()) for part in full.split('.')}
    near = [f'did you mean {k!r}?' for k in difflib.get_close_matches(key, known, 1)]
    return f'{place}unknown key {key!r}; ' + (near or ['configs/base.py has all keys'])[0]
  reason = str(error).strip().splitlines()
  return place + (f'{type(error).__name__}: {reason[0]}' if reason else type(error).__name__)


def flat(block: Mapping[str, Any] | ConfigDict, prefix: str = '') -> dict[str, Any]:
  """{key: leaf} of nested blocks."""
  out = {}
  for name, value in block.items():
    inner = isinstance(value, Mapping | ConfigDict)
    out |= flat(value, f'{prefix}{name}.') if inner else {prefix + name: value}
  return out


def check(config: ConfigDict, origin: str) -> None:
  """Refuses other keys than base's and other types than their defaults'; converts in place.

  Args:
    origin: where the config is from, for the message.
  """
  def visit(block, default, prefix):
    free = prefix[:-1] in base.OPEN or is_method(prefix[:-1])
    for name in block if free else {**default, **block}:
      key = prefix + str(name)
      if not free and name not in default:
        raise ValueError(f'{origin}: ' + names.unknown('key', key, [prefix + k for k in default]))
      if name not in block:
        raise ValueError(f'{origin}: {key} is missing; set keys one by one or with update(), '
                         'which leaves the others of their block as they are')
      inner = not free and isinstance(default[name], ConfigDict)
      if inner != isinstance(block[name], ConfigDict):
        raise ValueError(f'{origin}: {key} is {"not " if inner else ""}a block of keys')
      if inner:
        visit(block[name], default[name], key + '.')
      else:
        try:
          value = convert(block[name], *kind(default, key))
        except ValueError as error:
          raise ValueError(f'{origin}: {key} is {block[name]!r}, {error}') from None
        with block.ignore_type():        # of options that base does not list, the first value's
          block[name] = value

  visit(config, base.get_config(), '')


def is_method(key: str) -> bool:
  """Whether the block holds the options of an RL method."""
  first, _, name = key.partition('.')
  return first == 'rl' and name in METHODS


def kind(block: ConfigDict, key: str) -> tuple[type, type | None]:
  """What a leaf may hold: its type, and for tuples the type of the elements.

  Args:
    block: the default block the leaf is in; not read for blocks whose keys base does not list.
  """
  prefix, _, name = key.rpartition('.')
  if prefix in base.OPEN:
    return base.OPEN[prefix], None
  if is_method(prefix):
    method = prefix.partition('.')[2]
    default = names.choose(methods.defaults(method), name, f'option of {method}')
  else:
    default = block[name]
  if not isinstance(default, tuple):
    return type(default), None
  return tuple, base.ELEMENTS.get(name) or (type(default[0]) if default else str)


def convert(value: Any, wanted: type, element: type | None) -> Any:
  """The value as the wanted type; whole numbers may stand for floats and lists for tuples."""
  fits = isinstance(value, wanted)
  if isinstance(value, bool):
    fits = wanted is bool                # Python counts it among the ints
  elif wanted is float and isinstance(value, int):
    value, fits = float(value), True
  elif wanted is tuple and isinstance(value, list | tuple):
    value, fits = as_tuple(value), all(is_element(v, element) for v in value)
    if element is float and fits:
      value = tuple(float(v) for v in value)
  if not fits:
    raise ValueError(f'wanted {describe(wanted, element)}')
  return value


def as_tuple(value: Any) -> Any:
  return tuple(as_tuple(v) for v in value) if isinstance(value, list | tuple) else value


def is_element(value: Any, element: type) -> bool:
  """Whether a tuple of this kind may hold the value; tuple stands for names and tuples of names."""
  if element is tuple:
    parts = value if isinstance(value, tuple | list) else [value]
    return all(isinstance(v, str) for v in parts)
  kinds = (int, float) if element is float else element
  return isinstance(value, kinds) and not isinstance(value, bool)


def describe(wanted: type, element: type | None) -> str:
  if wanted is tuple:
    return 'a tuple of ' + ('names or pairs of names' if element is tuple else element.__name__)
  plain = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'a string'}
  return plain.get(wanted, f'a {wanted.__name__}')


def parse(text: str, wanted: type, element: type | None) -> Any:
  """The value that a text on the command line stands for."""
  try:
    if wanted is bool:
      return {'true': True, 'false': False}[text.lower()]
    if wanted in (int, float, str):
      return wanted(text)
    if wanted is tuple and text[:1] not in ('(', '['):
      inner = str if element is tuple else element
      return tuple(parse(part.strip(), inner, None) for part in text.split(',') if part.strip())
    return convert(ast.literal_eval(text), wanted, element)
  except (ValueError, KeyError, SyntaxError, TypeError):
    raise ValueError(f'wanted {describe(wanted, element)}') from None


def override(config: ConfigDict, key: str, text: str) -> None:
  """Sets one leaf from the command line; the text is read as the type of the key's default."""
  *path, name = key.split('.')
  block, default, seen = config, base.get_config(), ''
  for part in path:
    if part not in block:
      raise unknown(key, seen, block)
    if not isinstance(block[part], ConfigDict):
      raise ValueError(f'--config.{key}: {seen}{part} is a value, not a block of keys')
    block, default, seen = block[part], default[part], f'{seen}{part}.'
  if isinstance(block.get(name), ConfigDict):
    raise ValueError(f'--config.{key}: {key} is a block of keys: {", ".join(block[name].keys())}')
  if name not in block and seen[:-1] not in base.OPEN and not is_method(seen[:-1]):
    raise unknown(key, seen, block)
  try:
    value = parse(text, *kind(default, key))
  except ValueError as error:
    raise ValueError(f'--config.{key} is {text!r}, {error}') from None
  with block.unlocked():
    block[name] = value


def unknown(key: str, prefix: str, block: ConfigDict) -> ValueError:
  """The error of a key that is not there; a key of that name elsewhere is the first guess."""
  name = key.removeprefix(prefix).partition('.')[0]
  same = [full for full in flat(base.get_config()) if full.split('.')[-1] == name]
  if same:
    reason = f'unknown key {prefix + name!r}; did you mean {" or ".join(same)}?'
  else:
    reason = names.unknown('key', prefix + name, [prefix + k for k in block])
  return ValueError(f'--config.{key}: {reason}')


class Tracked(Mapping):
  """A read-only view of a config that remembers which leaves were read. Blocks are views again."""

  __slots__ = ('_block', '_prefix', '_read')

  def __init__(self, block: ConfigDict, prefix: str = '', read: set[str] | None = None):
    self._block, self._prefix = block, prefix
    self._read = set() if read is None else read

  def __getitem__(self, name: str) -> Any:
    if name not in self._block:
      known = [self._prefix + k for k in self._block]
      raise KeyError(names.unknown('key', self._prefix + name, known))
    value = self._block[name]
    if isinstance(value, ConfigDict):
      return Tracked(value, f'{self._prefix}{name}.', self._read)
    self._read.add(self._prefix + name)
    return value

  def __getattr__(self, name: str) -> Any:
    if name.startswith('_'):
      raise AttributeError(name)
    try:
      return self[name]
    except KeyError as error:
      raise AttributeError(error.args[0]) from None

  def __contains__(self, name: object) -> bool:
    return name in self._block               # Mapping would read the leaf

  def __iter__(self) -> Iterator[str]:
    return iter(self._block)

  def __len__(self) -> int:
    return len(self._block)

  def to_dict(self) -> dict[str, Any]:
    """Nested plain dicts; reads every leaf of the block."""
    plain = lambda x: x.to_dict() if isinstance(x, Tracked) else x
    return {name: plain(value) for name, value in self.items()}


def check_read(
    config: Tracked, explicit: Sequence[str] = (), file: ConfigDict | None = None) -> None:
  """Refuses settings without effect: leaves that differ from their default and were never read.

  Args:
    config: the view of the whole config through which the run was set up.
    explicit: keys that must be read even at their default: those named on the command line. If
      phases is one of them, only they must: the file is then one for other phases, too.
    file: what the config file says by itself. To take that back has an effect: wsd becomes constant
      by schedule=constant and decay=0.
  """
  default = flat(base.get_config())
  before = default if file is None else flat(file)
  differs = lambda key, value: value != default.get(key, ABSENT)
  must = lambda key, value: differs(key, value) or not differs(key, before.get(key, ABSENT))
  refuse_unread(config, [
      key for key, value in flat(config._block).items()
      if key in explicit and must(key, value)
      or differs(key, value) and 'phases' not in explicit])


def refuse_unread(config: Tracked, keys: Sequence[str]) -> None:
  """Refuses leaves that were set and never read."""
  whole, values = config._block, flat(config._block)
  unread = [f'{key} = {values[key]!r} ({reason(whole, key)})' for key in keys
            if key not in config._read]
  if unread:
    raise ValueError('set, but without effect: ' + '; '.join(unread))


def reason(config: ConfigDict, key: str) -> str:
  """Why a run may not have read a key."""
  first, *rest = key.split('.')
  if first in PHASES and first not in config.phases:
    return f'{first!r} is not among phases {config.phases}'
  if first == 'rl' and is_method(f'rl.{rest[0]}') and rest[0] not in config.rl.methods:
    return f'{rest[0]!r} is not among rl.methods {config.rl.methods}'
  if first in ('arithmetic', 'recall'):
    return f'no phase of the run has data.format {first!r}'
  if first == 'upcycle':
    u = config.upcycle
    return (f'growth is at_step {u.at_step}, by selection {u.selection!r} and allocation '
            f'{u.allocation!r}, with model.moe.bias_rate {config.model.moe.bias_rate} and bias '
            f'{config.model.moe.bias}')
  if rest[:1] == ['mtp']:
    m = config[first].mtp
    return f'{first}.mtp.coef is {m.coef} and {first}.mtp.switch is {m.switch}'
  if rest[:1] == ['data']:
    return f'{first}.data.format {config[first].data.format!r} does not use it'
  if rest[:1] == ['optimizer']:
    o = config[first].optimizer
    return f'{first}.optimizer is {o.name!r} with schedule {o.schedule!r}'
  return 'nothing in this run reads it'


def method_options(rl: Tracked | ConfigDict) -> dict[str, dict[str, Any]]:
  """The options that are set, by method: what `rl.methods.build` takes."""
  return {name: dict(rl[name]) for name in METHODS if rl[name]}


def at_least(least: float, config: Tracked, *keys: str) -> None:
  """Refuses smaller values of some leaves."""
  for key in keys:
    value = functools.reduce(lambda block, name: block[name], key.split('.'), config)
    if value < least:
      raise ValueError(f'{key} is {value}, wanted at least {least}')


def model_config(model: Tracked | ConfigDict, vocab_size: int) -> ModelConfig:
  """The static description of the model.

  Args:
    model: the config's block of that name.
    vocab_size: of the tokenizer; taken where the config says 0.
  """
  fields = model.to_dict()
  if 0 < fields['vocab_size'] < vocab_size:
    raise ValueError(f'model.vocab_size is {fields["vocab_size"]}, '
                     f'fewer than the {vocab_size} ids of the tokenizer')
  fields['vocab_size'] = fields['vocab_size'] or vocab_size
  fields['rules'] = tuple((axis, fields['rules'][axis]) for axis, _ in RULES)
  return model_lib.from_dict(fields)


def to_json(config: ConfigDict) -> str:
  return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
  """The locked config a text of `to_json` stands for; JSON has no tuples, configs have no lists.

  Keys that have come since it was written have the values of configs/base.py, under which nothing
  is other than before.
  """
  def tuples(value):
    if isinstance(value, dict):
      return {k: tuples(v) for k, v in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value

  def filled(value, default):
    if not (isinstance(value, dict) and isinstance(default, dict)):
      return value
    return {**default, **{k: filled(v, default.get(k)) for k, v in value.items()}}

  return ConfigDict(filled(tuples(json.loads(text)), base.get_config().to_dict())).lock()


class Change(NamedTuple):
  key: str
  old: Any
  new: Any


def diff(old_json: str, new: ConfigDict) -> list[Change]:
  """Differences that make a resumed run another run; what may change is left out."""
  old, now = flat(from_json(old_json)), flat(new)
  keys = [key for key in sorted(old.keys() | now.keys()) if not MAY_CHANGE.fullmatch(key)]
  changes = [Change(key, old.get(key, ABSENT), now.get(key, ABSENT)) for key in keys]
  return [change for change in changes if change.old != change.new]


def check_resume(old_json: str, new: ConfigDict) -> None:
  """Refuses to go on with another config than the one the workdir was begun with."""
  if changes := diff(old_json, new):
    listed = '; '.join(f'{c.key} was {c.old!r} and is now {c.new!r}' for c in changes)
    raise ValueError(f'the run in this workdir had another config: {listed}. '
                     'Take another workdir, or go on all the same with --allow_config_change')
