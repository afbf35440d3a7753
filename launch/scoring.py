"""Log-probabilities of texts of any length, in batches of few lengths, and rows of them."""

from collections.abc import Callable, Sequence

import numpy as np

from data import fields
from evals import metrics
from launch import engine, talk
from nn.types import LOGP

# What a row may have; see launch/score.py.
KINDS = (('text',), ('tokens',), ('prompt', 'response'), ('messages',))


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
      values = score(speaker.params, tokens, end, None, None, {}, (LOGP,), 1.0)[LOGP]
      for n, i in enumerate(some):
        found[i] = values[n, :end[n]]
      done(len(some))
    return found

  return logp


def read(row: dict, speaker: talk.Speaker) -> dict:
  """{'id' if there is one, 'tokens': ids, 'mask': 1 where a token is to be scored}."""
  tokenizer, most = speaker.tokenizer, speaker.cfg.max_length
  kinds = [names for names in KINDS if row.keys() >= set(names)]
  if len(kinds) != 1:
    wanted = ', or '.join(' and '.join(map(repr, names)) for names in KINDS)
    raise ValueError(f'the row has {sorted(row)}; wanted {wanted}, one of them')
  if kinds[0] == ('tokens',):
    ids = fields.ids(row, 'tokens', tokenizer.vocab_size)
    mask = [1] * len(ids)
  elif kinds[0] == ('messages',):
    ids, mask = fields.example(row, fields.Format(kind='chat'), tokenizer)
  elif kinds[0] == ('text',):
    ids = fields.begin(tokenizer) + tokenizer.encode(fields.string(row, 'text'))
    mask = [1] * len(ids)
  else:
    asked = fields.begin(tokenizer) + tokenizer.encode(fields.string(row, 'prompt', empty=True))
    answer = tokenizer.encode_after(fields.string(row, 'response'))
    ids, mask = asked + answer, [0] * len(asked) + [1] * len(answer)
  if len(ids) > most:
    raise ValueError(f'{len(ids)} tokens, the model reads at most {most}')
  mask = [0, *mask[1:]]
  if not any(mask):
    raise ValueError('nothing to score: there is no token with another before it')
  return {name: row[name] for name in ('id',) if name in row} | {'tokens': ids, 'mask': mask}


def scored(row: dict, values: np.ndarray) -> dict:
  """The row of the output, with the number of tokens that were 'scored'."""
  if not np.isfinite(values).all():
    raise ValueError('the model gives log-probabilities that are not finite')
  mask = row.pop('mask')
  count, total = sum(mask), float(np.dot(values.astype(np.float64), mask))
  perplexity = metrics.perplexity(total, count)
  return row | {
      'logp': [float(f'{x:.7g}') if m else None for x, m in zip(values, mask)], 'sum': total,
      'perplexity': perplexity if np.isfinite(perplexity) else None, 'scored': count}
