"""Talking to a checkpoint: what is asked, what is printed, what is refused."""

import functools
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import checkpoint, engine, generate
from nn import model
from saved_models import BYTES, make_config, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module', autouse=True)
def one_decoder():
  """Calls of the command compile once for all of them."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(engine, 'make_decoder', functools.cache(engine.make_decoder))
    yield


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(workdir, model config, parameters of the newest step)."""
  workdir = tmp_path_factory.mktemp('run')
  c = make_config(prompt='question', prompt_template='Q: {question}\nA: ')
  return str(workdir), *write(workdir, c, {3: 0, 7: 1})


@pytest.fixture
def talk(run, capsys, monkeypatch):
  """Runs the command; (standard output, standard error). With --json, the output's objects."""
  def call(*options, typed=''):
    monkeypatch.setattr(sys, 'stdin', io.StringIO(typed))
    capsys.readouterr()
    assert generate.main(['--workdir', run[0], *map(str, options)]) == 0
    out, err = capsys.readouterr()
    return ([json.loads(line) for line in out.splitlines()] if '--json' in options else out), err
  return call


def likeliest(params, cfg, text, count):
  """The likeliest next tokens, each found by a forward pass over all before it."""
  ids = BYTES.encode(text)
  forward = jax.jit(lambda tokens, segments: model.unembed(params, cfg, model.forward(
      params, cfg, tokens, jnp.arange(cfg.max_length)[None], segments).hidden))
  for _ in range(count):
    tokens = np.zeros((1, cfg.max_length), np.int32)
    tokens[0, :len(ids)] = ids
    inside = (np.arange(cfg.max_length) < len(ids))[None].astype(np.int32)
    ids.append(int(forward(tokens, inside)[0, len(ids) - 1].argmax()))
    if ids[-1] == BYTES.eos_id:
      break
  return BYTES.decode(ids)[len(text):]


def test_the_newest_checkpoint_is_asked_as_it_was_trained(run, talk):
  _, cfg, params = run
  (reply,), _ = talk('--prompt', '1+1?', '--temperature', 0, '--max_tokens', 12, '--json')
  assert reply['step'] == 7
  assert reply['prompt'] == 'Q: 1+1?\nA: '
  assert reply['response'] == likeliest(params, cfg, 'Q: 1+1?\nA: ', 12)


def test_another_step_and_another_template(run, talk):
  options = ('--prompt', '1+1?', '--temperature', 0, '--max_tokens', 12, '--json')
  (newest,), _ = talk(*options)
  (old,), _ = talk(*options, '--step', 3)
  (raw,), _ = talk(*options, '--template', '{prompt}')
  assert (old['step'], old['prompt']) == (3, newest['prompt'])
  assert raw['prompt'] == '1+1?'
  assert len({r['response'] for r in (newest, old, raw)}) == 3


def test_a_step_folder_is_a_workdir_too(run, talk):
  step = f'{run[0]}/checkpoints/3'
  (reply,), _ = talk('--workdir', step, '--prompt', 'a', '--max_tokens', 12, '--json')
  assert reply['step'] == 3


def test_seeds_prompts_and_numbers(talk):
  options = ('--max_tokens', 12, '--json')
  both, _ = talk('--prompt', 'ab', '--prompt', 'xyz', '--num', 2, *options)
  again, _ = talk('--prompt', 'ab', '--prompt', 'xyz', '--num', 2, *options)
  alone, _ = talk('--prompt', 'ab', '--num', 2, *options)
  other, _ = talk('--prompt', 'ab', '--num', 2, '--seed', 1, *options)
  assert [r['prompt'] for r in both] == ['Q: ab\nA: '] * 2 + ['Q: xyz\nA: '] * 2
  assert len({r['response'] for r in both}) == 4
  assert both == again
  assert [r['response'] for r in both[:2]] == [r['response'] for r in alone]
  assert not {r['response'] for r in alone} & {r['response'] for r in other}
  assert all(r['tokens'] == 12 or r['ended'] for r in both)


def test_text_for_people(talk):
  (reply,), _ = talk('--prompt', 'ab', '--max_tokens', 12, '--json')
  out, err = talk('--prompt', 'ab', '--max_tokens', 12)
  assert out == reply['response'] + '\n'
  assert not reply['ended']
  assert err == '(cut off after 12 tokens, see --max_tokens)\n'
  out, _ = talk('--prompt', 'ab', '--max_tokens', 12, '--num', 2)
  head = "--- 'Q: ab\\nA: ', response "
  assert out.startswith(f"{head}1\n{reply['response']}\n{head}2\n")


def test_a_response_ends_before_its_stop_string(talk):
  options = ('--prompt', 'ab', '--temperature', 0, '--max_tokens', 12, '--json')
  (whole,), _ = talk(*options)
  stop = next(c for c in whole['response'][2:] if c.isascii())
  (cut,), _ = talk(*options, '--stop', stop, '--stop', 'never')
  assert cut['response'] == whole['response'].partition(stop)[0]
  assert cut['ended']
  assert cut['tokens'] <= whole['tokens']


def test_top_k_of_1_is_greedy_and_certain(talk):
  (greedy,), _ = talk('--prompt', 'ab', '--temperature', 0, '--json', '--max_tokens', 12)
  for option in (('--top_k', 1), ('--top_p', 1e-6), ('--min_p', 1)):
    (reply,), _ = talk('--prompt', 'ab', '--json', '--max_tokens', 12, *option)
    assert reply['response'] == greedy['response']
    assert reply['logp'] == 0


def test_prompts_are_read_from_standard_input(talk):
  options = ('--json', '--max_tokens', 12, '--temperature', 0)
  typed, _ = talk(*options, typed='ab\nxyz\n')
  given, _ = talk(*options, '--prompt', 'ab', '--prompt', 'xyz')
  both, _ = talk(*options, '--prompt', 'ab', '--interactive', typed='xyz\n')
  said = lambda replies: [(r['prompt'], r['response']) for r in replies]
  assert said(typed) == said(given) == said(both)


def test_equal_lines_are_answered_with_different_noise(talk):
  replies, _ = talk('--json', '--max_tokens', 12, typed='ab\nab\n')
  assert replies[0]['response'] != replies[1]['response']


def test_a_prompt_that_cannot_be_answered_does_not_end_the_session(talk):
  replies, err = talk('--json', '--max_tokens', 12, typed='x' * 99 + '\nab\n')
  assert [r['prompt'] for r in replies] == ['Q: ab\nA: ']
  assert err.startswith('error: a prompt of 106 tokens is too long')


def test_chat_applies_the_template_and_goes_on(talk):
  options = ('--chat', '--json', '--temperature', 0, '--max_tokens', 12)
  (one,), _ = talk(*options, '--system', 'S', '--prompt', 'a')
  assert one['prompt'] == 'system: S\nuser: a\nassistant: '

  first, second, fresh = talk(*options, typed='a\nb\n/new\na\n')[0]

  assert first['prompt'] == fresh['prompt'] == 'user: a\nassistant: '
  assert first['response'] == fresh['response']
  assert second['prompt'] == f'user: a\nassistant: {first["response"]}\nuser: b\nassistant: '


def test_a_model_of_conversations_recommends_chat(tmp_path, talk):
  write(tmp_path, make_config(format='chat', prompt_template='unused {prompt}'), {1: 0})
  options = ('--workdir', tmp_path, '--prompt', 'a', '--json', '--max_tokens', 12)
  (reply,), err = talk(*options)
  assert reply['prompt'] == 'a'
  assert '--chat' in err
  assert '--chat' not in talk(*options, '--chat')[1]


@pytest.mark.parametrize('options, message', [
    (('--workdir', 'nowhere'), 'nowhere is no folder'),
    (('--step', 4), r'no checkpoint of step 4; there are \[3, 7\]'),
    (('--prompt', 'x' * 70, '--max_tokens', 20),
     'prompt of 77 tokens is too long: the model reads 96, of which 20'),
    (('--prompt', ''), "'question' is empty"),
    (('--max_tokens', 96), 'max_tokens is 96, but the model reads at most 96'),
    (('--max_tokens', -1), 'max_tokens is -1'),
    (('--top_p', 0), 'top_p is 0.0'),
    (('--top_p', 1.5), 'top_p is 1.5'),
    (('--min_p', 2), 'min_p is 2.0'),
    (('--top_k', -1), 'top_k is -1'),
    (('--temperature', -1), 'temperature is -1.0'),
    (('--num', 0), 'num is 0'),
    (('--stop', ''), 'stop wants'),
    (('--system', 'S'), 'needs --chat'),
    (('--chat', '--template', '{prompt}'), '--template'),
    (('--template', '{prompt} {context}'), "'context' is missing"),
    (('--template', 'nothing'), "without {prompt}"),
    (('--mesh', 'data'), "mesh 'data': wanted axis=devices"),
    (('--mesh', 'data=9'), 'needs 9 devices'),
])
def test_what_is_refused(talk, options, message):
  with pytest.raises(ValueError, match=message):
    talk('--prompt', 'ab', *options)


def test_a_workdir_without_a_checkpoint_is_refused(tmp_path, talk):
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(ValueError, match='without a whole checkpoint'):
    talk('--workdir', tmp_path, '--prompt', 'ab')


def test_parameters_alone_are_refused(tmp_path, run, talk):
  checkpoint.save_params(tmp_path / 'reference', run[2], {})
  with pytest.raises(ValueError, match='parameters alone'):
    talk('--workdir', tmp_path / 'reference', '--prompt', 'ab')


def test_a_mesh_does_not_change_the_response(talk):
  options = ('--prompt', 'ab', '--json', '--max_tokens', 12, '--temperature', 0)
  (one,), _ = talk(*options)
  (split,), _ = talk(*options, '--mesh', 'data=2,fsdp=2,model=2')
  assert split['response'] == one['response']


def test_the_command_runs_from_anywhere_and_says_errors_in_a_line(tmp_path):
  command = [sys.executable, str(ROOT / 'launch' / 'generate.py')]
  done = subprocess.run([*command, '--workdir', 'gone', '--prompt', 'a'],
                        cwd=tmp_path, capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stdout) == (2, '')
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and 'gone is no folder' in line
