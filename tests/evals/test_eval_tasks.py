"""Tasks through seqio's Evaluator, with answers and scores that are known beforehand."""

import math

import pytest

from evals import rows
from evals_toy import codec

pytest.importorskip('seqio')
from evals import tasks  # noqa: E402

pytestmark = pytest.mark.extras


def examples(kind, *found, **options):
  make, names = rows.KINDS[kind]
  return [rows.Example(x.inputs, x.targets, {'row': f'f:{i}', **x.info})
          for i, row in enumerate(found) for x in make(row, codec(**options), names)]


def answers(**known):
  """Looks up the text between 'Q: ' and the next line; [k] responses each."""
  def answer(prompts):
    found = []
    for ids in prompts:
      said = known[bytes(ids).decode().split('\n')[0][3:]] if ids else ['']
      found.append([list(text.encode()) for text in said])
    return found
  return answer


def never(*_):
  raise AssertionError('not this kind of model function')


def test_several_tasks_at_once_each_with_its_own_metric():
  found = tasks.evaluate(
      {'gsm8k': examples('gsm8k', {'question': 'a', 'answer': 'So\n#### 12'},
                         {'question': 'b', 'answer': '#### 3'}),
       'exact': examples('exact', {'prompt': 'c', 'answer': 'red'}, {'prompt': 'd', 'answer': 'x'},
                         {'prompt': 'e', 'answer': 'y'}),
       'choice_letter': examples('choice_letter', {
           'prompt': 'f', 'choices': ['u', 'v'], 'answer': 1}, room=200)},
      codec(), answers(a=['Twelve, #### 12.0'], b=['4'], c=['red '], d=['z'], e=[''],
                       f=['The answer is B']), never)
  assert {name: numbers['accuracy'] for name, (numbers, _) in found.items()} == {
      'gsm8k': 0.5, 'exact': pytest.approx(1 / 3), 'choice_letter': 1}
  assert found['exact'][0]['rows'] == 3
  assert found['gsm8k'][1] == [
      {'row': 'f:0', 'prompt': 'Q: a\nA: ', 'output': 'Twelve, #### 12.0', 'target': 'So\n#### 12',
       'correct': 1.0},
      {'row': 'f:1', 'prompt': 'Q: b\nA: ', 'output': '4', 'target': '#### 3', 'correct': 0.0}]


def test_a_task_may_be_evaluated_again():
  for right in (1, 0):
    found = tasks.evaluate({'exact': examples('exact', {'prompt': 'a', 'answer': 'b'})}, codec(),
                           answers(a=['b' * right]), never)
    assert found['exact'][0]['accuracy'] == right


def test_several_responses_and_prompts_that_are_too_long():
  def answer(prompts):
    assert [bool(ids) for ids in prompts] == [True, True, False]
    return [[list(b'x'), list(b'long answer'), []], [list(b'n')] * 3, [[], [], []]]

  made = examples('exact', {'prompt': 'a', 'answer': 'x'}, {'prompt': 'b', 'answer': 'y'},
                  {'prompt': 'c' * 99, 'answer': ''})
  numbers, lines = tasks.evaluate({'exact': made}, codec(), answer, never)['exact']
  assert numbers == {'accuracy': pytest.approx(1 / 9), 'pass@3': pytest.approx(1 / 3), 'rows': 3,
                     'too_long': 1}
  assert [line['output'] for line in lines] == ['x', 'long answer', '', *'nnn', '', '', '']
  assert [line['correct'] for line in lines] == [1] + [0] * 8


def test_choices_by_likelihood_raw_and_per_token():
  logp = {'Paris': -5.5, 'Rome': -4.8, 'at': -3.0, 'elsewhere': -8.0, 'in': -1.0, 'out': -6.0}

  def score(pairs):
    return [logp[bytes(targets).decode()] for _, targets in pairs]

  made = examples(
      'choice',
      {'prompt': 'a', 'choices': ['Paris', 'Rome'], 'answer': 1},          # per token: -1.1, -1.2
      {'prompt': 'b', 'choices': ['at', 'elsewhere'], 'answer': 1},        # -3/2, -8/9
      {'prompt': 'c', 'choices': ['in', 'out'], 'answer': 1})
  numbers, lines = tasks.evaluate({'choice': made}, codec(), never, score)['choice']
  assert numbers == {'accuracy': pytest.approx(1 / 3), 'rows': 3,
                     'accuracy_normalised': pytest.approx(1 / 3)}
  assert [line['output'] for line in lines] == [1, 0, 0]
  assert [line['output_normalised'] for line in lines] == [0, 1, 0]
  assert lines[0]['logp'] == pytest.approx([-5.5, -4.8]) and lines[0]['target'] == 1
  assert [line['row'] for line in lines] == ['f:0', 'f:1', 'f:2']


def test_perplexity_is_of_all_tokens_and_of_every_text():
  score = lambda pairs: [len(targets) * math.log(1 / 4) for _, targets in pairs]
  made = examples('perplexity', {'text': 'abcde'}, {'text': 'x' * 300})
  numbers, lines = tasks.evaluate({'perplexity': made}, codec(), never, score)['perplexity']
  assert numbers['perplexity'] == pytest.approx(4)
  assert numbers['bits_per_byte'] == pytest.approx(2 * (4 + 299) / 305)
  assert (numbers['tokens'], numbers['bytes'], numbers['rows']) == (303, 305, 2)
  assert [line['tokens'] for line in lines] == [4, 299]
  assert lines[0]['bits_per_byte'] == pytest.approx(2 * 4 / 5)
