"""Judging answers: plain functions of text and numbers. N examples, C choices."""

import math
import re
from collections.abc import Sequence

import numpy as np

from rl.rewards import pool

LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'
SAID = re.compile(r'[Aa]nswer\W+(?:is\W+)?([A-Z])\b')      # 'the answer is (B).'
ALONE = re.compile(r'\b([A-Z])\b')


def exact_match(target: str, output: str) -> float:
  """1 if both are the same but for white space, runs of which count as one space."""
  return float(target.split() == output.split())


def maths(targets: Sequence[str], outputs: Sequence[str]) -> tuple[np.ndarray, dict]:
  """Mathematical equivalence, see rl/rewards/maths.py: every pair within a deadline.

  Returns:
    [N] of 0 and 1; and how many pairs had an 'errors' (a target that is no mathematics, for
    instance) or 'timeouts', which score 0, with the 'first_error'.
  """
  grader = pool.Grader({'math': 'math'})
  try:
    items = [('', output, {'answer': target}) for target, output in zip(targets, outputs)]
    scores, report = grader.grade(items)
  finally:
    grader.close()
  return scores['math'], report


def likeliest(logp: Sequence[float], tokens: Sequence[int]) -> tuple[int, int]:
  """Which of C choices the model would take; the first of equals.

  Args:
    logp: [C], of the whole choice after the prompt, in nats.
    tokens: [C], its length.

  Returns:
    The choice by log-probability, and by log-probability per token (arXiv:2005.14165, 2.4).
  """
  logp, tokens = np.asarray(logp, np.float64), np.asarray(tokens)
  return int(np.argmax(logp)), int(np.argmax(logp / tokens))


def letter(output: str, num_choices: int) -> int | None:
  """Which of so many choices an output names: the letter after its last 'answer' or 'answer is',
  else its first capital letter that stands alone; None if it names none.
  """
  known = LETTERS[:num_choices]
  said = [c for c in SAID.findall(output) if c in known][-1:]
  found = said or [c for c in ALONE.findall(output) if c in known]
  return known.index(found[0]) if found else None


def perplexity(logp: float, tokens: int) -> float:
  """Of tokens whose log-probabilities add up to logp, in nats; infinite beyond floats."""
  with np.errstate(over='ignore'):
    return float(np.exp(np.float64(-logp / tokens)))


def bits_per_byte(logp: float, num_bytes: int) -> float:
  """What perplexity is per token, per byte of the text: the same question to every tokenizer."""
  return -logp / math.log(2) / num_bytes
