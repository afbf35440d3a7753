"""The names a config may use: complete recipes, and the pieces they are made of."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from rl import pieces
from rl.compose import compose, ready
from rl.methods import dapo, dr_grpo, grpo, mtp, rloo
from rl.names import choose
from rl.types import Method

METHODS = {
    'grpo': grpo.grpo,
    'dr_grpo': dr_grpo.dr_grpo,
    'rloo': rloo.rloo,
    'dapo': dapo.dapo,
    'group_advantage': pieces.group_advantage,
    'centred_advantage': pieces.centred_advantage,
    'leave_one_out': pieces.leave_one_out,
    'overlong': pieces.overlong,
    'shuffled_rewards': pieces.shuffled_rewards,
    'mixed_groups': pieces.mixed_groups,
    'policy': pieces.policy,
    'kl': pieces.kl,
    'entropy': pieces.entropy,
    'sft': pieces.sft,
    'tis': pieces.tis,
    'mis': pieces.mis,
    'icepop': pieces.icepop,
    'geometric': pieces.geometric,
    'mtp_detach': mtp.mtp_detach,
    'mtp_ce': mtp.mtp_ce,
    'mtp_policy': mtp.mtp_policy,
    'mtp_occ': mtp.mtp_occ,
}
SUPPLIED = ('max_tokens', 'mtp_depth')   # parameters that the run itself gives


def defaults(name: str) -> dict[str, Any]:
  """{option: default} of a method, without SUPPLIED."""
  parameters = inspect.signature(choose(METHODS, name, 'method')).parameters
  return {p.name: p.default for p in parameters.values() if p.name not in SUPPLIED}


def build(names: tuple[str, ...], options: Mapping[str, Mapping[str, Any]], *extra: Method,
          max_tokens: int = 0, mtp_depth: int = 0) -> Method:
  """The run's method, composed and ready.

  Args:
    names: keys of METHODS, in order.
    options: {name: {option: value}}, over the defaults in the signatures.
    *extra: methods of the run itself, such as its rewards; they come first.
    max_tokens: of a response; goes to every method with a parameter of this name. 0: the run
      samples nothing.
    mtp_depth: heads of multi-token prediction that the model has; likewise.

  Raises:
    ValueError: an unknown method or option, an option of the wrong type or of a method not in
      names, a method named twice, one that needs max_tokens in a run without, and whatever
      `rl.compose.ready` refuses.
  """
  if isinstance(names, str):
    raise ValueError(f'methods must be a tuple of names, got the string {names!r}')
  for name in names:
    choose(METHODS, name, 'method')
  if twice := sorted({n for n in names if list(names).count(n) > 1}):
    raise ValueError(f'methods {twice} are named twice')
  for name in sorted(n for n in options if options[n]):
    if name not in names:
      raise ValueError(f'options for {name!r}, which is not among the methods {list(names)}')
  methods = [one(name, options.get(name, {}), max_tokens, mtp_depth) for name in names]
  return ready(compose(*extra, *methods))


def one(name: str, options: Mapping[str, Any], max_tokens: int, mtp_depth: int = 0) -> Method:
  """One method by name, its options checked against its signature."""
  parameters = inspect.signature(METHODS[name]).parameters
  known = defaults(name)
  given = {key: checked(f'{name}.{key}', value, choose(known, key, f'option of {name}'))
           for key, value in options.items()}
  if 'max_tokens' in parameters:
    if parameters['max_tokens'].default is inspect.Parameter.empty and max_tokens < 1:
      raise ValueError(f'{name} needs the length of a response, and this run samples none')
    given['max_tokens'] = max_tokens
  if 'mtp_depth' in parameters:
    given['mtp_depth'] = mtp_depth
  try:
    return METHODS[name](**given)
  except ValueError as e:
    raise ValueError(f'{name}: {e}') from e


def checked(name: str, value: Any, default: Any) -> Any:
  """The value in the type of the option's default."""
  kind = type(default)
  if kind is float and type(value) is int:
    value = float(value)
  if kind is tuple and type(value) is list:
    value = tuple(value)
  if type(value) is not kind:
    raise ValueError(f'{name} is {value!r}, wanted {kind.__name__} like its default {default!r}')
  if kind is float and not math.isfinite(value):
    raise ValueError(f'{name} is {value}, wanted a finite number')
  return value
