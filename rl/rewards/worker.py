"""A reward worker: loads rewards, then answers one row at a time until its parent goes."""

import logging
import math
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from rl import rewards


def main(fd: int) -> None:
  """Reads {name: spec} and answers None or an error; then reads tasks and answers with scores.

  fd: of a connection to the parent. A task is (name, item), its answer (score, None or an error).
  """
  threading.Thread(target=leave_with_parent, daemon=True).start()
  logging.getLogger('math_verify').setLevel(logging.ERROR)    # it warns that its timers are off
  connection = Connection(fd)
  functions, error = {}, None
  try:
    functions = {name: rewards.load(spec) for name, spec in connection.recv().items()}
    if rewards.REWARDS['math'] in functions.values():
      rewards.REWARDS['math']('', '0', {'answer': '0'})       # imports, not on a row's time
  except BaseException as e:
    error = describe(e)
  connection.send(error)
  while True:
    try:
      name, item = connection.recv()
    except EOFError:
      return
    connection.send((0.0, error) if error else score(functions[name], item))


def score(function: Callable, item: tuple) -> tuple[float, str | None]:
  """(score, None), or (0, what went wrong): a verifier may raise anything and return anything."""
  try:
    value = function(*item)
    if isinstance(value, (str, bytes)):
      raise TypeError(f'returned the string {value!r}, wanted a number')
    number = float(value)
    if not math.isfinite(number):
      raise ValueError(f'returned {number}')
    return number, None
  except BaseException as e:
    return 0.0, describe(e)


def describe(e: BaseException) -> str:
  try:
    return f'{type(e).__name__}: {e}'[:500]
  except BaseException:
    return type(e).__name__


def leave_with_parent() -> None:
  """Standard input is a pipe that the parent never writes to: it ends when the parent does."""
  while os.read(sys.stdin.fileno(), 1):
    pass
  os._exit(0)
