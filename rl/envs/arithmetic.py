"""Sums that are made up, for a policy to learn and a program to check."""

import dataclasses
import math
import random

COMMUTATIVE = '+*'


@dataclasses.dataclass(frozen=True)
class Arithmetic:
  """What the problems look like: '37+48=', answered '85', or '7+8+0=15,3+4+1=8#85' if worked."""
  digits: int = 2                     # of an operand; operands are uniform over 0 .. 10**digits - 1
  operands: int = 2
  ops: tuple[str, ...] = ('+',)       # which of + - * may stand between operands, each as likely
  worked: bool = False                # answers show every column added up, from the units
  pad: bool = False                   # leading zeros make all problems equally long
  backwards: bool = False             # results are written from the units, as computed

  def __post_init__(self):
    if self.digits < 1 or self.operands < 2:
      raise ValueError(f'arithmetic.digits is {self.digits}, wanted at least 1; '
                       f'arithmetic.operands is {self.operands}, wanted at least 2')
    if not self.ops or set(self.ops) - set('+-*') or len(set(self.ops)) < len(self.ops):
      raise ValueError(f'arithmetic.ops is {self.ops}, wanted some of +, -, *, each once')
    if self.worked and (self.ops != ('+',) or self.digits < 2):
      raise ValueError(f'arithmetic.worked adds up columns: wanted ops + and at least 2 digits, '
                       f'got {self.ops} and {self.digits}')


def split(task: Arithmetic, seed: int, train: int, demos: int,
          heldout: int) -> tuple[list[dict], list[dict], list[dict]]:
  """Three sets of problems without overlap, not even of the same operands in another order.

  Returns:
    train, demos and heldout rows, {'prompt', 'response', 'answer'}: a demonstration, and what has
    to stand after its last '#', or alone.

  Raises:
    ValueError: there are not that many different problems.
  """
  needed = train + demos + heldout
  if min(train, demos, heldout) < 0 or needed > capacity(task):
    raise ValueError(f'{train} + {demos} + {heldout} arithmetic problems wanted, '
                     f'there are {capacity(task)} different ones')
  rng, seen, rows = random.Random(seed), set(), []
  while len(rows) < needed:
    numbers = tuple(rng.randrange(10 ** task.digits) for _ in range(task.operands))
    ops = tuple(rng.choice(task.ops) for _ in range(task.operands - 1))
    key = (tuple(sorted(numbers)) if commutes(ops) else numbers, ops)
    if key not in seen:
      seen.add(key)
      rows.append(row(task, numbers, ops))
  return rows[:train], rows[train:train + demos], rows[train + demos:]


def commutes(ops: tuple[str, ...]) -> bool:
  return len(set(ops)) == 1 and ops[0] in COMMUTATIVE


def capacity(task: Arithmetic) -> int:
  """Number of problems; where the order of the operands cannot matter, all orders are one."""
  values, same = 10 ** task.digits, sum(op in COMMUTATIVE for op in task.ops)
  others = len(task.ops) ** (task.operands - 1) - same
  sets = math.comb(values + task.operands - 1, task.operands)
  return same * sets + others * values ** task.operands


def evaluate(numbers: tuple[int, ...], ops: tuple[str, ...]) -> int:
  """The value of numbers joined by ops, products first."""
  terms = [numbers[0]]
  for op, number in zip(ops, numbers[1:]):
    if op == '*':
      terms[-1] *= number
    else:
      terms.append(number if op == '+' else -number)
  return sum(terms)


def written(value: int, width: int, backwards: bool) -> str:
  """The number with at least `width` digits; backwards: from the units. A sign stands in front."""
  text = str(abs(value)).zfill(width)
  return '-' * (value < 0) + (text[::-1] if backwards else text)


def row(task: Arithmetic, numbers: tuple[int, ...], ops: tuple[str, ...]) -> dict[str, str]:
  """One problem, its demonstration and its answer."""
  largest = 10 ** task.digits - 1
  most = largest ** task.operands if '*' in task.ops else largest * task.operands
  operand = lambda x: written(x, task.digits if task.pad else 1, backwards=False)
  prompt = operand(numbers[0]) + ''.join(op + operand(x) for op, x in zip(ops, numbers[1:])) + '='
  answer = written(evaluate(numbers, ops), len(str(most)) if task.pad else 1, task.backwards)
  response = f'{columns(task, numbers)}#{answer}' if task.worked else answer
  return {'prompt': prompt, 'response': response, 'answer': answer}


def columns(task: Arithmetic, numbers: tuple[int, ...]) -> str:
  """The sums of the columns, from the units: the operands' digits, what is carried, their sum."""
  width, carry, work = len(str(10 * task.operands - 1)) if task.pad else 1, 0, []
  for place in range(task.digits):
    summands = [x // 10 ** place % 10 for x in numbers] + [carry]
    work.append('+'.join(map(str, summands)) + '=' + str(sum(summands)).zfill(width))
    carry = sum(summands) // 10
  return ','.join(work)
