"""Rewards that only look at characters: cheap and safe enough to run in the trainer's process."""

import re
from typing import Any

NUMBER = r'-?\d[\d,]*(?:\.\d+)?'
LAST_LINE = re.compile(rf'#### {NUMBER}')
SOMEWHERE = re.compile(rf'#### ?\$?{NUMBER}')


def final(text: str) -> str:
  """What follows the last '#', stripped; the whole text if there is none."""
  return text.rsplit('#', 1)[-1].strip()


def exact(prompt: str, response: str, row: dict[str, Any]) -> float:
  """1 if the response's final answer is row['answer'], character by character."""
  del prompt
  return float(final(response) == final(str(row['answer'])))


def number(prompt: str, response: str, row: dict[str, Any]) -> float:
  """The asked form, right or wrong: 1 if the last line is '#### <number>' and the only one such,
  1/2 if there is such a thing anywhere. A small weight of it gives a beginner something to learn.
  """
  del prompt, row
  found = SOMEWHERE.findall(response)
  last = response.rstrip().rsplit('\n', 1)[-1]
  if len(found) == 1 and LAST_LINE.fullmatch(last):
    return 1.0
  return 0.5 if found else 0.0


def digits(prompt: str, response: str, row: dict[str, Any]) -> float:
  """Share of digits among the characters: any policy can learn it, so it serves benchmarks."""
  del prompt, row
  return sum(c in '0123456789' for c in response) / max(len(response), 1)
