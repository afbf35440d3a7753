"""Mathematical equivalence by the math-verify package. Runs in a worker, see `rl.rewards.pool`."""

import re
from typing import Any

# Answers come last. The package's patterns backtrack, and beginners write thousands of digits.
MAX_CHARACTERS = 1000
MAX_FORMULA = 100       # characters: longer text without $ or a box around its formulas is prose


def boxed(text: str) -> str:
  """The last \\boxed{...} of the text with its braces balanced, or ''."""
  start, depth = text.rfind('\\boxed{'), 0
  for i in range(start, len(text)) if start >= 0 else ():
    depth += (text[i] == '{') - (text[i] == '}')
    if text[i] == '}' and depth == 0:
      return text[start:i + 1]
  return ''


def candidate(text: str) -> str:
  """Where the answer is: the last \\boxed{...}, else the line after the last '####', else the end.
  """
  text = text[-MAX_CHARACTERS:].replace('\N{MINUS SIGN}', '-').strip()
  if found := boxed(text):
    return found
  if '####' in text:
    return (text.rsplit('####', 1)[1].strip().splitlines() or [''])[0]
  return text


def bare_formula(text: str) -> bool:
  """Whether the text is LaTeX or algebra, like x+1, that only lacks its dollar signs."""
  if '$' in text or '\\boxed' in text:
    return False
  words = re.findall(r'(?<![\\A-Za-z])[A-Za-z]+', text)
  algebra = words and max(map(len, words)) == 1 and re.search(r'[-+*/^=]', text)
  return '\\' in text or bool(algebra)


def parse(text: str) -> list:
  """The answer in the text as math-verify's expressions, best first; [] if there is none."""
  import math_verify  # 60 MB and a second: only workers need it

  # The package's own timers are signals, which refuse threads; the worker's deadline covers this.
  read = lambda text: math_verify.parse(text, parsing_timeout=None)
  spot = candidate(text)
  short = 0 < len(spot) <= MAX_FORMULA
  if short and bare_formula(spot):
    return read(f'${spot}$')
  return read(spot) or (read(f'${spot}$') if short else [])


def equivalent(prompt: str, response: str, row: dict[str, Any]) -> float:
  """1 if the response's answer and row['answer'] are the same number, expression or set.

  Both may be in GSM8K's form (after '####') or boxed. A response without either is read from its
  end: the last number or formula counts.
  """
  import math_verify
  del prompt
  gold = parse(str(row['answer']))
  if not gold:
    raise ValueError(f'no mathematical answer in {row["answer"]!r}')
  return float(math_verify.verify(gold, parse(response), timeout_seconds=None))
