"""Rewards by name, and a user's own by file. A reward is `reward(prompt, response, row) -> float`.

prompt and response are strings, row is the data row's fields. Nothing here imports jax, so that
workers start fast.
"""

import ast
import importlib.util
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

from rl.names import unknown
from rl.rewards import maths, simple

REWARDS = {
    'exact': simple.exact,
    'number': simple.number,
    'digits': simple.digits,
    'math': maths.equivalent,
}
IN_PROCESS = ('exact', 'number', 'digits')    # the others run in workers, which a deadline can kill
READS_ANSWER = ('exact', 'math')              # these need row['answer']


def check(spec: str) -> str:
  """The spec with an absolute path, after a look at the file, which is not run.

  Args:
    spec: a key of REWARDS, or 'path/to/file.py:function'.

  Raises:
    ValueError: no such reward, file or function, a file that is no Python, or a function that
      cannot be called with three arguments.
  """
  if spec in REWARDS:
    return spec
  path, colon, name = spec.rpartition(':')
  if not colon:
    raise ValueError(unknown('reward', spec, REWARDS) + '; your own is path/to/file.py:function')
  file = Path(path).expanduser().resolve()
  if not file.is_file():
    raise ValueError(f'reward {spec!r}: there is no file {file}')
  try:
    tree = ast.parse(file.read_bytes())
  except (SyntaxError, ValueError) as e:
    raise ValueError(f'reward {spec!r}: {file} is not Python: {e}') from e
  functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
  if name not in functions:
    raise ValueError(f'reward {spec!r}: {unknown("function", name, functions)} in {file}')
  a = functions[name].args
  most = len(a.posonlyargs + a.args)
  least = most - len(a.defaults)
  required_by_name = [k.arg for k, default in zip(a.kwonlyargs, a.kw_defaults) if default is None]
  if least > 3 or (most < 3 and not a.vararg) or required_by_name:
    raise ValueError(f'reward {spec!r}: {name} must take (prompt, response, row)')
  return f'{file}:{name}'


def load(spec: str) -> Callable:
  """The function of a checked spec. Runs the file: only workers may load what is not built in."""
  if spec in REWARDS:
    return REWARDS[spec]
  path, _, name = spec.rpartition(':')
  sys.path.append(os.path.dirname(path))     # last: a file's neighbours must not hide a package
  module_name = f'reward_{zlib.crc32(path.encode()):08x}'
  found = importlib.util.spec_from_file_location(module_name, path)
  module = sys.modules[module_name] = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  return getattr(module, name)
