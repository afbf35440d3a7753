"""Log-probabilities of texts of any length, worked off in batches of few lengths."""

from collections.abc import Callable, Sequence

import numpy as np

from launch import engine, talk
from nn.types import LOGP


def make_logp(speaker: talk.Speaker, rows: int) -> Callable:
  """logp(texts of ids, done) -> for each its log-probabilities [length] float32, in nats.

  Index t is about token t; the first has nothing before it and gets 0. A result depends on its own
  text alone.

  Args:
    rows: of one pass.
  """
  cfg = speaker.cfg
  if rows < 1:
    raise ValueError(f'rows is {rows}, wanted at least 1')
  score = engine.make_score(cfg, speaker.mesh, rows)

  def logp(texts: Sequence[Sequence[int]], done: Callable[[int], None] = lambda count: None):
    """done: called with the number of texts of every pass."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = [None] * len(texts)
    for first in range(0, len(order), rows):
      some = order[first:first + rows]
      end = np.array([len(texts[i]) for i in some])
      tokens = np.zeros((len(some), engine.few(end[-1], cfg.max_length)), np.int32)
      for row, i in zip(tokens, some):
        row[:len(texts[i])] = texts[i]
      values = score(speaker.params, tokens, end, None, {}, (LOGP,), 1.0)[LOGP]
      for n, i in enumerate(some):
        found[i] = values[n, :end[n]]
      done(len(some))
    return found

  return logp
