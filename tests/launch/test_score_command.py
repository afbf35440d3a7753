"""Scoring rows: what is scored, that it is the softmax of the forward pass, and what is refused."""

import gzip
import json
import math

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from data import tokenizer as tokenizer_lib
from launch import conversion, engine, score, talk
from saved_models import BYTES, CFG, logp_by_hand, make_config, write

TURNS = [{'role': 'user', 'content': 'ab'}, {'role': 'assistant', 'content': 'cd'},
         {'role': 'user', 'content': 'e'}, {'role': 'assistant', 'tokens': [200, 7]}]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(workdir, model config, parameters)."""
  workdir = tmp_path_factory.mktemp('run')
  return str(workdir), *write(workdir, make_config(), {2: 0})


@pytest.fixture
def scored(run, tmp_path, capsys):
  """Runs the command on rows; the rows it wrote."""
  def call(rows, *options, packed=False):
    source = tmp_path / ('in.jsonl.gz' if packed else 'in.jsonl')
    content = ''.join((r if isinstance(r, str) else json.dumps(r)) + '\n' for r in rows).encode()
    source.write_bytes(gzip.compress(content) if packed else content)
    target = tmp_path / 'new' / 'out.jsonl'
    assert score.main(['--model', run[0], '--input', str(source), '--output', str(target),
                       *map(str, options)]) == 0
    return [json.loads(line) for line in target.read_text().splitlines()]
  return call


def assert_logp(row, expected, start):
  """expected: of all tokens from the second on; scored are those from `start`."""
  assert row['logp'][:start] == [None] * start
  np.testing.assert_allclose(row['logp'][start:], expected[start - 1:], atol=2e-5)
  total = sum(expected[start - 1:])
  assert row['sum'] == pytest.approx(total, abs=1e-4)
  assert row['perplexity'] == pytest.approx(
      math.exp(-total / (len(row['tokens']) - start)), rel=1e-4)


def test_every_kind_of_row_is_the_softmax_of_the_forward_pass(run, scored):
  _, cfg, params = run
  whole = BYTES.encode('Q: 1+1?\nA: 2')
  found = scored([
      {'text': 'Q: 1+1?\nA: 2', 'id': 'x', 'other': 1}, {'tokens': whole},
      {'prompt': 'Q: 1+1?\nA:', 'response': ' 2', 'id': 7}])
  assert [row['tokens'] for row in found] == [whole] * 3
  by_hand = logp_by_hand(params, cfg, whole)
  for row, start in zip(found, (1, 1, len(whole) - 2)):
    assert_logp(row, by_hand, start)
  assert [row.get('id') for row in found] == ['x', None, 7]
  assert found[2]['logp'][-2:] == found[0]['logp'][-2:]
  assert found[0].keys() == {'id', 'tokens', 'logp', 'sum', 'perplexity'}


def test_of_a_conversation_the_assistants_tokens_are_scored(run, scored):
  _, cfg, params = run
  (row,) = scored([{'messages': TURNS}])
  first = BYTES.encode('user: ab\nassistant: ')
  second = BYTES.encode('\nuser: e\nassistant: ')
  said = [*BYTES.encode('cd'), BYTES.eos_id]
  assert row['tokens'] == first + said + second + [200, 7, BYTES.eos_id] + BYTES.encode('\n')
  by_hand = [None, *logp_by_hand(params, cfg, row['tokens'])]
  inside = [*range(len(first), len(first) + 3),
            *range(len(row['tokens']) - 4, len(row['tokens']) - 1)]
  assert [i for i, x in enumerate(row['logp']) if x is not None] == inside
  np.testing.assert_allclose(
      [row['logp'][i] for i in inside], [by_hand[i] for i in inside], atol=2e-5)


def test_other_rows_of_a_batch_and_padding_change_nothing(scored):
  rng = np.random.default_rng(0)
  rows = [{'tokens': rng.integers(3, 259, n).tolist()} for n in (2, 96, 40, 65, 64, 3, 90, 2, 17)]
  one_by_one = scored(rows, '--rows', 1)
  assert [row['tokens'] for row in one_by_one] == [row['tokens'] for row in rows]
  for options in (('--rows', 4), ('--rows', 4, '--mesh', 'data=2,fsdp=2')):
    for a, b in zip(one_by_one, scored(rows, *options), strict=True):
      np.testing.assert_allclose(a['logp'][1:], b['logp'][1:], atol=2e-5)


def test_rows_are_read_a_part_at_a_time_and_keep_their_order(monkeypatch, scored, capsys):
  monkeypatch.setattr(score, 'PASSES', 1)
  found = scored([{'text': 'x' * n, 'id': n} for n in (9, 3, 5, 2, 7)], '--rows', 2, packed=True)
  assert [(row['id'], len(row['tokens'])) for row in found] == [(n, n) for n in (9, 3, 5, 2, 7)]
  out, err = capsys.readouterr()
  total = sum(row['sum'] for row in found)
  assert out.startswith(f'5 rows, 21 tokens scored, perplexity {math.exp(-total / 21):.6g}: ')
  assert 'score  5/5 rows' in err.splitlines()[-1]


def test_a_public_folder_gives_the_same_as_the_run_it_came_from(tmp_path):
  """The one door that every command uses."""
  letters = tokenizers.Tokenizer(models.WordLevel({'</s>': 0, 'a': 1, 'b': 2, 'c': 3}))
  letters.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
  letters.save(str(tmp_path / 'tokenizer.json'))
  c = make_config(CFG | {'vocab_size': 4}, format='chat')
  c.tokenizer = str(tmp_path / 'tokenizer.json')
  write(tmp_path / 'run', c, {3: 0}, tokenizer_lib.load(c.tokenizer).vocab_size)
  conversion.to_public(str(tmp_path / 'run'), str(tmp_path / 'public'))
  (tmp_path / 'in.jsonl').write_text('{"text": "abcab"}\n')
  found = []
  for name in ('run', 'public'):
    assert score.main(['--model', str(tmp_path / name), '--input', str(tmp_path / 'in.jsonl'),
                       '--output', str(tmp_path / f'{name}.jsonl')]) == 0
    found.append((tmp_path / f'{name}.jsonl').read_text())
  assert found[0] == found[1] and json.loads(found[0])['tokens'] == [1, 2, 3, 1, 2]
  opened = [talk.open_model(str(tmp_path / name), {'data': 1}) for name in ('run', 'public')]
  assert [(x.step, x.template, x.chats) for x in opened] == [
      (3, '{prompt}', True), (0, '{prompt}', False)]
  with pytest.raises(ValueError, match='Hugging Face folder, which has no step 3'):
    talk.open_model(str(tmp_path / 'public'), {'data': 1}, 3)
  (tmp_path / 'public' / 'tokenizer.json').unlink()
  with pytest.raises(ValueError, match='has no tokenizer'):
    talk.open_model(str(tmp_path / 'public'), {'data': 1})


def test_texts_of_any_length_compile_few_programs():
  assert [engine.few(n, 5000) for n in (1, 64, 65, 129, 193, 257, 385, 4000, 5000)] == [
      64, 64, 128, 192, 256, 384, 512, 4096, 5000]
  assert all(n <= engine.few(n, 1 << 17) < max(65, 1.5 * n + 64) for n in range(1, 3000))
  assert len({engine.few(n, 1 << 17) for n in range(1, 1 << 17)}) == 22


@pytest.mark.parametrize('row, said', [
    ('{"text": "a', 'in.jsonl:3: not JSON'),
    ({'txt': 'a'},
     r"in.jsonl:3: the row has \['txt'\]; wanted 'text', or 'tokens', or 'prompt' and"),
    ({'prompt': 'a'}, r"in.jsonl:3: the row has \['prompt'\]; wanted"),
    ({'text': 'ab', 'tokens': [1, 2]}, 'in.jsonl:3: .* one of them'),
    ({'text': 7}, "in.jsonl:3: field 'text' is int, wanted text"),
    ({'text': 'a'}, 'in.jsonl:3: nothing to score'),
    ({'tokens': [4, 259]}, 'in.jsonl:3: .* ids from 4 to 259, the vocabulary has 259'),
    ({'prompt': 'a', 'response': ''}, "in.jsonl:3: field 'response' is empty"),
    ({'messages': TURNS[:1]}, 'in.jsonl:3: no message of the assistant'),
    ({'text': 'x' * 97}, 'in.jsonl:3: 97 tokens, the model reads at most 96'),
])
def test_a_bad_row_is_named_and_nothing_is_left(scored, tmp_path, row, said):
  with pytest.raises(ValueError, match=said):
    scored([{'text': 'fine'}, '', row])
  assert not list((tmp_path / 'new').iterdir())


def test_other_refusals(scored, tmp_path):
  with pytest.raises(ValueError, match='rows is 0'):
    scored([{'text': 'fine'}], '--rows', 0)
  with pytest.raises(ValueError, match='no file matches'):
    score.main(['--model', 'gone', '--input', 'gone', '--output', str(tmp_path / 'x')])
