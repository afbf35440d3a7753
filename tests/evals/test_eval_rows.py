"""What rows become: what is read, what is scored, what is refused."""

import pytest

from evals import rows
from evals_toy import codec

NAMES = {kind: names for kind, (_, names) in rows.KINDS.items()}
QUIZ = {'prompt': 'Capital?', 'choices': ['Paris', 'Rome', ' Oslo'], 'answer': 1}


def test_a_problem_is_asked_in_its_template():
  (made,) = rows.problem({'question': '1+1?', 'answer': '#### 2'}, codec(), NAMES['gsm8k'])
  assert made == rows.Example(list(b'Q: 1+1?\nA: '), [], {
      'prompt': 'Q: 1+1?\nA: ', 'target': '#### 2', 'too_long': False})


def test_a_prompt_without_room_for_a_response_is_not_asked():
  row = {'prompt': 'x' * 57, 'answer': 3}
  (fits,) = rows.problem(row, codec(room=64), NAMES['math'])
  (long,) = rows.problem(row, codec(room=63), NAMES['math'])
  assert len(fits.inputs) == 64 and not fits.info['too_long']
  assert long.inputs == [] and long.info['too_long'] and long.info['target'] == '3'


def test_every_choice_is_scored_behind_the_prompt():
  made = rows.choices(QUIZ, codec(), NAMES['choice'])
  assert [bytes(x.targets) for x in made] == [b'Paris', b'Rome', b' Oslo']
  assert {bytes(x.inputs) for x in made} == {b'Q: Capital?\nA: '}
  assert [x.info['tokens'] for x in made] == [5, 4, 5]
  bare = rows.choices(QUIZ, codec(template='{}'), NAMES['choice'])
  assert [bytes(x.targets) for x in bare] == [b' Paris', b' Rome', b' Oslo']


def test_choices_are_listed_under_letters():
  (made,) = rows.letters(QUIZ, codec(room=200), NAMES['choice_letter'])
  assert made.info['prompt'] == (
      'Q: Capital?\nA. Paris\nB. Rome\nC.  Oslo\nAnswer with the letter of the right choice.\nA: ')
  assert (made.info['target'], made.info['choices'], made.targets) == ('B', 3, [])


@pytest.mark.parametrize('length', [2, 7, 8, 9, 12, 13, 31])
def test_every_token_of_a_text_but_the_first_is_scored_once_with_half_a_window_before(length):
  text = ''.join(chr(97 + i % 26) for i in range(length))
  made = rows.document({'text': text}, codec(max_length=8), NAMES['perplexity'])
  assert b''.join(bytes(x.targets) for x in made) == text.encode()[1:]
  assert all(len(x.inputs) + len(x.targets) <= 8 for x in made)
  assert len(made[0].inputs) == 1 and all(len(x.inputs) >= 4 for x in made[1:])
  read = 1
  for x in made:
    assert bytes(x.inputs) == text.encode()[read - len(x.inputs):read]
    read += len(x.targets)
  assert sum(x.info['tokens'] for x in made) == length - 1
  assert sum(x.info['bytes'] for x in made) == length


@pytest.mark.parametrize('kind, row, said', [
    ('gsm8k', {'prompt': 'a', 'answer': '1'}, "field 'question' is missing; the row has"),
    ('gsm8k', {'question': '', 'answer': '1'}, "field 'question' is '', wanted text"),
    ('exact', {'prompt': 'a', 'answer': ['b']}, r"field 'answer' is \['b'\], wanted text or a num"),
    ('exact', {'prompt': 'a', 'answer': True}, 'wanted text or a number'),
    ('choice', QUIZ | {'answer': 3}, "'answer' is 3, wanted the index of one of 3 choices"),
    ('choice', QUIZ | {'answer': 'B'}, "'answer' is 'B', wanted the index"),
    ('choice', QUIZ | {'answer': True}, "'answer' is True, wanted the index"),
    ('choice', QUIZ | {'choices': ['one']}, 'wanted a list of at least 2 texts'),
    ('choice', QUIZ | {'choices': ['a', 'b' * 90]}, 'the prompt with choice 1 has 105 tokens'),
    ('choice_letter', QUIZ | {'choices': ['x'] * 27}, '27 choices, there are 26 letters'),
    ('perplexity', {'text': 'a'}, 'a single token'),
])
def test_what_is_refused(kind, row, said):
  make, names = rows.KINDS[kind]
  with pytest.raises(ValueError, match=said):
    make(row, codec(), names)
