"""Evaluation of models whose answers are known: by construction, or by a forward pass by hand."""

import json

import numpy as np
import pytest

from launch import convert, evaluate
from public_qwen3 import RIGHT, write_public
from saved_models import BYTES, CFG, logp_by_hand, make_config, parrot, write

pytest.importorskip('seqio')
pytestmark = pytest.mark.extras

# What comes after the question depends on its last character alone.
FOLLOWS = {'a': '4', '4': '2', '2': '', 'b': '7', '7': '', 'c': 'B', 'B': '', 'd': 'd'}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(workdir of random parameters, model config, parameters)."""
  workdir = tmp_path_factory.mktemp('run')
  return str(workdir), *write(workdir, make_config(), {2: 0})


@pytest.fixture(scope='module')
def parrots(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('parrot')
  c = make_config(CFG | {'embed_dim': 260, 'tied': False, 'max_length': 256})
  write(workdir, c, {1: parrot(c, FOLLOWS)})
  return str(workdir)


@pytest.fixture
def evaluated(tmp_path):
  """Runs the command on {task: rows}; its metrics, and its lines {task: [...]}."""
  def call(model, tasks, *options):
    arguments = []
    for name, rows in tasks.items():
      path = tmp_path / f'{name}_rows.jsonl'
      path.write_text(
          rows if isinstance(rows, str) else ''.join(json.dumps(r) + '\n' for r in rows))
      arguments += ['--task', name, '--files', str(path)]
    out = tmp_path / 'out'
    assert evaluate.main(['--model', model, *arguments, '--output', str(out),
                          *map(str, options)]) == 0
    lines = {name: [json.loads(x) for x in (out / f'{name}.jsonl').read_text().splitlines()]
             for name in tasks}
    return json.loads((out / 'metrics.json').read_text()), lines
  return call


def test_known_answers_give_known_accuracies(parrots, evaluated, capsys):
  found, lines = evaluated(parrots, {
      'gsm8k': [{'question': 'What is a', 'answer': 'Six times 7.\n#### 42'},
                {'question': 'And then b', 'answer': '#### 7.0'},
                {'question': 'And, longer than the others, a', 'answer': '#### 41'},
                {'question': 'x' * 300 + 'a', 'answer': '#### 42'}],
      'exact': [{'question': 'b', 'answer': 7}, {'question': 'd', 'answer': 'd'}],
  }, '--fields', 'prompt=question', '--rows', 2, '--max_tokens', 4)
  gsm8k, exact = found['tasks']['gsm8k'], found['tasks']['exact']
  assert gsm8k == {'accuracy': 0.5, 'rows': 4, 'too_long': 1}
  assert exact == {'accuracy': 0.5, 'rows': 2}
  assert [(x['output'], x['correct']) for x in lines['gsm8k']] == [
      ('42', 1), ('7', 1), ('42', 0), ('', 0)]
  assert [x['output'] for x in lines['exact']] == ['7', 'dddd']
  assert lines['gsm8k'][1]['row'].endswith('gsm8k_rows.jsonl:2')
  assert (found['step'], found['options']['model'], found['options']['max_tokens']) == (
      1, parrots, 4)
  out, err = capsys.readouterr()
  assert 'gsm8k: accuracy 0.5, rows 4, too_long 1' in out
  assert '1 of 2 responses were cut off after 4 tokens' in err and 'answer  3/3 prompts' in err


def test_an_imported_model_is_evaluated_as_the_folder_it_came_from(evaluated, tmp_path):
  write_public(tmp_path / 'public', tmp_path / 'tokenizer')
  assert convert.main(
      ['--from-hf', str(tmp_path / 'public'), '--to', str(tmp_path / 'imported')]) == 0
  rows = [{'question': f'How many {i}?', 'answer': '#### 42'} for i in range(3)]
  options = ('--num', 4, '--temperature', 1, '--max_tokens', 4, '--template',
             '<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n')
  found, lines = evaluated(str(tmp_path / 'imported'), {'gsm8k': rows}, *options)
  right = [RIGHT in x['output'] for x in lines['gsm8k']]
  assert [x['correct'] for x in lines['gsm8k']] == right and 0 < sum(right) < len(right) == 12
  assert found['tasks']['gsm8k']['accuracy'] == np.mean(right)
  assert evaluated(str(tmp_path / 'public'), {'gsm8k': rows}, *options)[1] == lines


def test_letters_stops_templates_and_several_responses(parrots, evaluated):
  row = {'prompt': 'Which', 'choices': ['one', 'two'], 'answer': 1}
  found, lines = evaluated(parrots, {'choice_letter': [row, row | {'answer': 0}]},
                           '--template', '{prompt}c', '--max_tokens', 4)
  assert found['tasks']['choice_letter'] == {'accuracy': 0.5, 'rows': 2}
  assert lines['choice_letter'][0]['output'] == 'B'
  found, lines = evaluated(
      parrots, {'exact': [{'prompt': 'a', 'answer': '4'}, {'prompt': 'b', 'answer': '4'}]},
      '--stop', '2', '--num', 3, '--temperature', 0.1, '--max_tokens', 4)
  assert found['tasks']['exact'] == {'accuracy': 0.5, 'pass@3': 0.5, 'rows': 2}
  assert [x['output'] for x in lines['exact']] == ['4'] * 3 + ['7'] * 3


def test_choices_and_perplexity_are_those_of_the_forward_pass(run, evaluated):
  model, cfg, params = run
  rng = np.random.default_rng(0)
  word = lambda: ''.join(rng.choice(list('abcdefgh'), rng.integers(1, 9)))
  quiz = [{'prompt': word(), 'choices': [word() for _ in range(3)], 'answer': int(rng.integers(3))}
          for _ in range(8)]
  text = 'one and one is two. ' * 9                              # 180 tokens: windows of 96
  found, lines = evaluated(model, {'choice': quiz, 'perplexity': [{'text': text}]}, '--rows', 3)

  picked, per_token = [], []
  for row in quiz:
    asked = BYTES.encode(row['prompt'])
    ends = [BYTES.encode(' ' + choice) for choice in row['choices']]
    logp = [logp_by_hand(params, cfg, asked + end)[-len(end):].sum() for end in ends]
    picked.append(int(np.argmax(logp)))
    per_token.append(int(np.argmax([x / len(end) for x, end in zip(logp, ends)])))
  answers = np.array([row['answer'] for row in quiz])
  assert [x['output'] for x in lines['choice']] == picked
  assert [x['output_normalised'] for x in lines['choice']] == per_token
  assert picked != per_token
  assert found['tasks']['choice'] == {
      'accuracy': (answers == picked).mean(), 'accuracy_normalised': (answers == per_token).mean(),
      'rows': 8}

  ids = BYTES.encode(text)
  total = (logp_by_hand(params, cfg, ids[:96]).sum()
           + logp_by_hand(params, cfg, ids[48:144])[-48:].sum()
           + logp_by_hand(params, cfg, ids[84:])[-36:].sum())
  numbers = found['tasks']['perplexity']
  assert numbers['perplexity'] == pytest.approx(np.exp(-total / 179), rel=1e-5)
  assert numbers['bits_per_byte'] == pytest.approx(-total / 180 / np.log(2), rel=1e-5)


def test_plain_text_files_may_be_read_for_perplexity(run, evaluated, tmp_path):
  (tmp_path / 'a.txt').write_text('some words')
  (tmp_path / 'b.jsonl').write_text('{"text": "some words"}\n')
  out = tmp_path / 'out'
  assert evaluate.main(['--model', run[0], '--task', 'perplexity', '--output', str(out), '--files',
                        str(tmp_path / 'a.txt'), str(tmp_path / 'b.jsonl')]) == 0
  one, other = [json.loads(x) for x in (out / 'perplexity.jsonl').read_text().splitlines()]
  assert one.pop('row').endswith('a.txt, row 0') and other.pop('row').endswith('b.jsonl:1')
  assert one == other


def test_chat_asks_by_the_template(parrots, evaluated):
  _, lines = evaluated(parrots, {'exact': [{'prompt': 'a', 'answer': 'b'}]},
                       '--chat', '--system', 'S', '--max_tokens', 2)
  assert lines['exact'][0]['prompt'] == 'system: S\nuser: a\nassistant: '


@pytest.mark.parametrize('options, said', [
    (('--task', 'gsm9k'), "unknown task 'gsm9k'; did you mean 'gsm8k'?"),
    (('--task', 'exact', '--task', 'math'), '2 --task and 1 --files'),
    (('--task', 'exact', '--files', 'x', '--task', 'exact'), "'exact' is given twice"),
    (('--task', 'exact', '--fields', 'prompt'), "fields 'prompt': wanted what=field"),
    (('--task', 'exact', '--fields', 'text=x'), r"fields \['text'\] mean nothing to"),
    (('--task', 'exact', '--num', 2), 'num is 2 at temperature 0'),
    (('--task', 'exact', '--num', 0), 'num is 0'),
    (('--task', 'exact', '--num', 9, '--temperature', 1, '--rows', 8), 'num is 9, rows 8'),
    (('--task', 'exact', '--limit', -1), 'limit -1'),
    (('--task', 'exact', '--system', 'S'), 'needs --chat'),
    (('--task', 'exact'), 'rows.jsonl:2: field .prompt. is missing'),
    (('--task', 'exact', '--limit', 1, '--max_tokens', 96),
     'max_tokens is 96, but the model reads'),
])
def test_what_is_refused(run, tmp_path, options, said):
  (tmp_path / 'rows.jsonl').write_text('{"prompt": "a", "answer": "b"}\n{"answer": "b"}\n')
  with pytest.raises(ValueError, match=said):
    evaluate.main(['--model', run[0], *map(str, options), '--files', str(tmp_path / 'rows.jsonl'),
                   '--output', str(tmp_path / 'out')])
  assert not (tmp_path / 'out').exists()
