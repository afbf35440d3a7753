"""The generated task: right answers, splits without overlap, and every problem if asked for."""

import re

import pytest

from rl.envs import arithmetic
from rl.envs.arithmetic import Arithmetic, split
from rl.rewards import simple

KINDS = {
    'plain': Arithmetic(),
    'three': Arithmetic(digits=1, operands=3, ops=('+', '-', '*')),
    'minus': Arithmetic(digits=3, ops=('-',)),
    'times': Arithmetic(ops=('*',), pad=True),
    'worked': Arithmetic(worked=True),
    'worked, three': Arithmetic(digits=3, operands=3, worked=True),
    'backwards': Arithmetic(pad=True, backwards=True, ops=('+', '-')),
    'worked, backwards': Arithmetic(worked=True, pad=True, backwards=True),
}


def value_of(prompt):
  """The value of a prompt in another way than the code's: as a sum of signed products."""
  total = 0
  for sign, product in re.findall(r'([+-]?)([\d*]+)', prompt.rstrip('=')):
    factor = 1
    for number in product.split('*'):
      factor *= int(number)
    total += -factor if sign == '-' else factor
  return total


def read(kind, text):
  """The number an answer stands for."""
  sign, figures = ('-', text[1:]) if text.startswith('-') else ('', text)
  return int(sign + (figures[::-1] if kind.backwards else figures))


def rows_of(name, train=60, demos=40, heldout=50):
  return split(KINDS[name], 0, train, demos, heldout)


@pytest.mark.parametrize('name', KINDS)
def test_answers_are_right_and_demonstrations_earn_the_reward(name):
  rows = sum(rows_of(name), [])
  for row in rows:
    assert read(KINDS[name], row['answer']) == value_of(row['prompt'])
    assert simple.exact(row['prompt'], row['response'], row) == 1
  others = rows[1:] + rows[:1]
  wrong = [simple.exact(r['prompt'], o['response'], r) for r, o in zip(rows, others)]
  assert sum(wrong) < 0.2 * len(rows)


@pytest.mark.parametrize('name', ['worked', 'worked, three', 'worked, backwards'])
def test_worked_answers_are_long_and_every_column_is_right(name):
  kind = KINDS[name]
  for row in sum(rows_of(name), []):
    work, answer = row['response'].split('#')
    assert answer == row['answer'] and len(row['response']) >= 12
    numbers = [int(x) for x in row['prompt'].rstrip('=').split('+')]
    carry = 0
    columns = work.split(',')
    assert len(columns) == kind.digits
    for place, column in enumerate(columns):
      left, right = column.split('=')
      summands = [int(x) for x in left.split('+')]
      assert summands == [x // 10 ** place % 10 for x in numbers] + [carry]
      assert int(right) == sum(summands)
      carry = int(right) // 10


def test_two_problems_by_hand():
  kind = Arithmetic(worked=True)
  assert arithmetic.row(kind, (37, 48), ('+',)) == {
      'prompt': '37+48=', 'response': '7+8+0=15,3+4+1=8#85', 'answer': '85'}
  kind = Arithmetic(pad=True, backwards=True, ops=('-',))
  assert arithmetic.row(kind, (3, 48), ('-',)) == {
      'prompt': '03-48=', 'response': '-540', 'answer': '-540'}


@pytest.mark.parametrize('name', ['times', 'worked, backwards'])
def test_padded_problems_are_all_equally_long(name):
  rows = sum(rows_of(name), [])
  for field in ('prompt', 'response', 'answer'):
    assert len({len(row[field]) for row in rows}) == 1


def operands(prompt):
  """What is asked, whatever the order of the operands of a sum or a product."""
  numbers, ops = re.findall(r'\d+', prompt), re.findall(r'[-+*]', prompt)
  alike = len(set(ops)) == 1 and ops[0] != '-'
  return tuple(sorted(numbers) if alike else numbers), tuple(ops)


@pytest.mark.parametrize('name', KINDS)
def test_no_problem_comes_twice_in_any_order_of_its_operands(name):
  sets = rows_of(name)
  assert [len(s) for s in sets] == [60, 40, 50]
  asked = [operands(row['prompt']) for s in sets for row in s]
  assert len(set(asked)) == 150


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
  assert rows_of('plain') == rows_of('plain')
  other = split(KINDS['plain'], 1, 60, 40, 50)
  assert other[0] != rows_of('plain')[0]


@pytest.mark.parametrize('kind, size', [
    (Arithmetic(digits=1), 55),                                        # 10 * 11 / 2
    (Arithmetic(digits=1, ops=('-',)), 100),
    (Arithmetic(digits=1, ops=('+', '*', '-')), 55 + 55 + 100),
    (Arithmetic(digits=1, operands=3, ops=('+', '-')), 220 + 3 * 1000),
])
def test_every_problem_can_be_had_and_not_one_more(kind, size):
  assert arithmetic.capacity(kind) == size
  everything = sum(split(kind, 0, size - 5, 2, 3), [])
  assert len({operands(row['prompt']) for row in everything}) == size
  with pytest.raises(ValueError, match=f'there are {size} different'):
    split(kind, 0, size - 4, 2, 3)


def test_operands_are_uniform_over_their_range():
  rows, _, _ = split(Arithmetic(digits=2), 0, 2000, 0, 0)
  numbers = [int(x) for row in rows for x in re.findall(r'\d+', row['prompt'])]
  assert min(numbers) == 0 and max(numbers) == 99
  assert abs(sum(numbers) / len(numbers) - 49.5) < 3       # 4.6 standard errors of 4000 draws


@pytest.mark.parametrize('options, word', [
    (dict(digits=0), 'digits'), (dict(operands=1), 'operands'), (dict(ops=()), 'ops'),
    (dict(ops=('/',)), 'ops'), (dict(ops=('+', '+')), 'ops'),
    (dict(worked=True, ops=('-',)), 'worked'), (dict(worked=True, digits=1), 'worked'),
])
def test_kinds_without_sense_are_refused(options, word):
  with pytest.raises(ValueError, match=word):
    Arithmetic(**options)


def test_negative_sizes_are_refused():
  with pytest.raises(ValueError, match='wanted'):
    split(Arithmetic(), 0, 10, -1, 5)
