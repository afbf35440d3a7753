"""Prompts for RL: random access, shuffled epochs, long and malformed rows, and no need of grain."""

import collections
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import sources, tokenizer
from data.fields import Format
from data.prompts import Prompts
from data.shuffle import permuted
from data_samples import write_rows

BYTES = tokenizer.load('bytes')
FORM = Format(kind='problem', prompt='question', prompt_template='Q: {prompt}\nA: ')
ROWS = [{'question': f'{i}+{i}?', 'answer': str(2 * i)} for i in range(10)]


def make(rows=ROWS, **options):
  options = {'form': FORM, 'max_prompt': 20, 'seed': 1} | options
  return Prompts(sources.Listed(rows, 'list'), BYTES, **options)


def test_a_prompt_has_its_text_its_ids_and_the_fields_of_its_row():
  (one,) = make(shuffle=False).take(13, 1)
  text = 'Q: 3+3?\nA: '
  assert one == {'question': '3+3?', 'answer': '6', 'prompt': text, 'row_id': 3,
                 'tokens': tuple(BYTES.encode(text))}


def test_what_is_taken_depends_on_the_cursor_alone():
  made, again = make(), make()
  whole = made.take(0, 35)
  assert again.take(17, 5) == whole[17:22]
  assert again.take(0, 35) == whole
  assert make(seed=2).take(0, 35) != whole


def test_epochs_are_complete_and_in_orders_of_their_own():
  ids = [p['row_id'] for p in make().take(0, 40)]
  epochs = [tuple(ids[i:i + 10]) for i in range(0, 40, 10)]
  assert all(sorted(e) == list(range(10)) for e in epochs)
  assert len(set(epochs)) == 4


@pytest.mark.parametrize('size', [1, 2, 3, 16, 17, 100, 1000])
def test_the_shuffle_is_a_permutation(size):
  assert sorted(permuted(i, size, 'key') for i in range(size)) == list(range(size))


def test_the_shuffle_leaves_no_trace_of_the_order():
  moved = [permuted(i, 1000, 'key') for i in range(1000)]
  steps = collections.Counter(b - a for a, b in zip(moved, moved[1:]))
  assert max(steps.values()) < 15                        # one or two of each are expected
  assert sum(i == m for i, m in enumerate(moved)) < 10
  assert moved != [permuted(i, 1000, 'other') for i in range(1000)]


def test_conversations_are_asked_for_their_last_answer():
  talk = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'},
          {'role': 'user', 'content': 'c'}]
  rows = [{'messages': talk}, {'messages': [*talk, {'role': 'assistant', 'content': 'd'}]}]
  made = make(rows, form=Format(kind='chat'), max_prompt=99)
  assert made.row(0)['prompt'] == 'user: a\nassistant: b\nuser: c\nassistant: '
  assert made.row(1)['prompt'] == made.row(0)['prompt']
  assert made.row(0)['tokens'] == made.row(1)['tokens']
  assert made.row(0)['tokens'].count(BYTES.eos_id) == 1                # ends the first answer


LONG = [{'question': 'x' * n, 'answer': 'y'} for n in (3, 30, 4, 40)]


def test_a_prompt_that_is_too_long_is_named():
  made = make(LONG, shuffle=False)
  with pytest.raises(ValueError, match='list, row 1: a prompt of 37 tokens, max_prompt is 20'):
    made.take(0, 4)


def test_long_and_malformed_rows_are_left_out_and_counted():
  made = make([*LONG, {'answer': 'y'}], long='drop', skip_bad_rows=True)
  assert len(made) == 2
  assert sorted(p['row_id'] for p in made.take(2, 2)) == [0, 2]
  assert made.dropped['long'][0] == 2 and made.dropped['bad'][0] == 1
  assert made.dropped['bad'][1].startswith("list, row 4: field 'question' is missing")
  with pytest.raises(ValueError, match="list, row 4: field 'question'"):
    make([*LONG, {'answer': 'y'}], long='drop')
  with pytest.raises(ValueError, match='list, row 1: a prompt of 37 tokens'):
    make(LONG, skip_bad_rows=True)
  with pytest.raises(ValueError, match='no prompt is left'):
    make(LONG[1::2], long='drop')


def test_a_wrong_field_name_is_an_error_at_once():
  with pytest.raises(
      ValueError, match="field 'prompt' is missing; the row has \\['answer', 'question'\\]"):
    make(form=Format(kind='problem'))


def test_prompts_of_files(tmp_path):
  rows = sources.load(write_rows(tmp_path / 'a.jsonl.zst', ROWS), str(tmp_path))
  made = Prompts(rows, BYTES, form=FORM, max_prompt=20, seed=1)
  assert made.take(5, 9) == make().take(5, 9)
  assert json.loads(json.dumps(made.identity()))['source'][0]['name'] == 'a.jsonl.zst'


def test_prompts_chat_and_tokenizers_need_no_grain():
  code = ("import sys; from data import prompts, chat, tokenizer\n"
          "print([m for m in ('grain', 'jax', 'tensorflow', 'seqio') if m in sys.modules])")
  result = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True,
                          cwd=Path(__file__).parents[2])
  assert result.stdout.strip() == '[]'
