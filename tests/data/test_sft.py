"""Rows of problems and conversations: what is learnt, what is too long, what is wrong."""

import collections

import pytest

from data import build, fields, sources, tokenizer
from data.fields import Format
from data_samples import piece_model, write_rows

BYTES = tokenizer.load('bytes')
GSM = Format(prompt='question', response='answer', prompt_template='Q: {prompt}\nA: ')


def examples(rows, form=GSM, length=64, **options):
  made = options.pop('made', BYTES)
  return build.of_rows(sources.Listed(rows, 'list'), made, form=form, length=length, **options)


def test_only_the_response_and_its_end_are_learnt():
  found = examples([{'question': '1+1?', 'answer': '2'}]).example(0, 0)
  assert BYTES.decode(found['tokens']) == 'Q: 1+1?\nA: 2'
  assert found['tokens'][-1] == BYTES.eos_id
  assert found['mask'].tolist() == [0] * len('Q: 1+1?\nA: ') + [1, 1]


def test_templates_take_other_fields_and_leave_braces_in_values_alone():
  form = Format(prompt_template='{topic}: {prompt} = ')
  row = {'topic': 'sets', 'prompt': '{prompt} {x}', 'response': '1'}
  assert fields.prompt(row, form, BYTES)[0] == 'sets: {prompt} {x} = '


def test_a_start_token_comes_first(tmp_path):
  made = tokenizer.load(str(piece_model(tmp_path / 'a.model')))
  row = {'question': 'the cat', 'answer': 'sat', 'text': 'the cat'}
  assert made.bos_id is not None
  asked = examples([row], made=made).example(0, 0)['tokens'].tolist()
  assert asked[0] == made.bos_id and made.bos_id not in asked[1:]
  whole = examples([row], Format(kind='text'), made=made).example(0, 0)
  assert whole['tokens'].tolist() == [made.bos_id, *made.encode('the cat'), made.eos_id]


def test_conversations():
  talk = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
  found = examples([{'messages': talk}], Format(kind='chat')).example(0, 0)
  assert [t for t, m in zip(found['tokens'], found['mask']) if m] == [ord('b') + 3, BYTES.eos_id]


LONG = [{'question': 'x' * n, 'answer': 'yes'} for n in (10, 80, 20, 55)]


def test_a_row_that_is_too_long_is_named():
  found = examples(LONG)
  assert len(found.example(0, 0)['tokens']) == 10 + len('Q: \nA: ') + 4
  with pytest.raises(ValueError, match='list, row 1: 91 tokens, rows have 64'):
    found.example(1, 0)


@pytest.mark.parametrize('long, kept, counted', [
    ('drop', [21, 31], {'long': 2}),
    ('truncate', [21, 31, 64], {'long': 1, 'truncated': 1}),     # of one, no response would be left
])
def test_rows_that_are_too_long_are_dropped_or_cut_and_counted(long, kept, counted):
  dropped = collections.Counter()
  found = [len(tokens) for tokens, _, _ in examples(LONG, long=long).in_order(dropped)]
  assert found == kept
  assert dropped == counted


@pytest.mark.parametrize('row, complaint', [
    ({'question': 'a'}, "field 'answer' is missing; the row has \\['question'\\]"),
    ({'question': 'a', 'answer': 4}, "field 'answer' is int, wanted text"),
    ({'question': '', 'answer': 'b'}, "field 'question' is empty"),
])
def test_a_malformed_row_is_named_with_file_line_and_field(tmp_path, row, complaint):
  path = write_rows(tmp_path / 'a.jsonl', [{'question': 'a', 'answer': 'b'}, row])
  found = build.examples(path, BYTES, form=GSM, length=64, seed=0, cache=str(tmp_path))
  with pytest.raises(ValueError, match=f'{path}:2: {complaint}'):
    found.example(1, 0)
  skipping = build.examples(path, BYTES, form=GSM, length=64, seed=0, cache=str(tmp_path),
                            skip_bad_rows=True)
  bad = skipping.example(1, 0)
  assert len(bad['tokens']) == 0 and bad['fault'] == 'bad' and f'{path}:2' in bad['why']


@pytest.mark.parametrize('messages, complaint', [
    (None, "field 'messages' is missing"),
    ([], "field 'messages': wanted a list"),
    (['a'], "field 'messages': wanted a list"),
    ([{'role': 'user', 'content': 'a'}], 'no message of the assistant'),
])
def test_malformed_conversations(messages, complaint):
  row = {} if messages is None else {'messages': messages}
  with pytest.raises(ValueError, match=f'list, row 0: {complaint}'):
    examples([row], Format(kind='chat')).example(0, 0)


def test_unknown_options_are_named():
  with pytest.raises(ValueError, match="format is 'poem'"):
    Format(kind='poem')
  with pytest.raises(ValueError, match="long is 'cut'"):
    examples(LONG, long='cut')
