"""How far a command has come, as one line on standard error."""

import math
import sys
import time

from launch import metrics


class Progress:
  """Written over on a terminal; elsewhere a plain line from time to time, and one at the end."""

  def __init__(self, what: str, total: int, unit: str):
    self._what, self._total, self._unit = what, total, unit
    self._done, self._began, self._said, self._width = 0, time.monotonic(), -math.inf, 0

  def add(self, count: int) -> None:
    self._done += count
    now, over = time.monotonic(), self._done >= self._total
    seconds = max(now - self._began, 1e-9)
    text = (f'{self._what}  {self._done}/{self._total} {self._unit}  '
            f'{metrics.short(self._done / seconds)} {self._unit}/s')
    if not over:
      left = metrics.duration((self._total - self._done) * seconds / max(self._done, 1))
      text = f'{text}  ETA {left}'
    if sys.stderr.isatty():
      print('\r' + text.ljust(self._width), end='\n' * over, file=sys.stderr, flush=True)
      self._width = len(text)
    elif over or now - self._said >= metrics.SECONDS_BETWEEN_LINES:
      print(text, file=sys.stderr, flush=True)
      self._said = now
