"""A user's own tokenizer and files through all phases of one run, and a talk with what came out."""

import contextlib
import io
import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import train_runs
from launch import generate, metrics, score

CONFIG = '''
from configs import base, tiny

def get_config():
  c = tiny.get_config()
  c.arithmetic.update(base.get_config().arithmetic)
  c.phases = ('pretrain', 'sft', 'rl')
  c.model.pattern = (('gdn', 'moe'), 'attention')
  c.model.repeats = 1
  c.model.max_length = 64
  c.pretrain.steps = c.sft.steps = c.rl.steps = 2
  c.pretrain.rows, c.pretrain.length = 4, 16
  c.sft.rows, c.sft.length = 4, 64
  c.rl.max_prompt, c.rl.max_tokens = 32, 8
  c.sft.data.format = 'chat'
  c.rl.data.format = 'problem'
  c.rl.rewards = {'exact': 'exact'}
  c.eval.reward = ''
  return c
'''
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
            "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% endfor %}")


def write_tokenizer(folder):
  """A byte-level BPE of a few merges, with ChatML's special tokens."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.train_from_iterator(['one and one is two'] * 20, trainers.BpeTrainer(
      vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
      special_tokens=['<|im_start|>', '<|im_end|>']))
  made.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(
      json.dumps({'eos_token': '<|im_end|>', 'chat_template': TEMPLATE}))


def test_three_phases_on_a_users_files(tmp_path):
  write_tokenizer(tmp_path)
  (tmp_path / 'config.py').write_text(CONFIG)
  (tmp_path / 'a.txt').write_text('one and one is two. ' * 40)
  turns = [{'role': 'user', 'content': 'one?'}, {'role': 'assistant', 'tokens': [100, 101, 1]},
           {'role': 'user', 'content': 'two?'}, {'role': 'assistant', 'content': 'two'}]
  (tmp_path / 'chat.jsonl').write_text(json.dumps({'messages': turns}) + '\n')
  (tmp_path / 'problems.jsonl').write_text('{"prompt": "one and one is", "answer": "two"}\n')
  workdir, said = tmp_path / 'run', io.StringIO()
  with contextlib.redirect_stdout(said):
    assert train_runs.run(
        workdir, f'tokenizer={tmp_path / "tokenizer.json"}',
        f'pretrain.data.files={tmp_path / "a.txt"}',
        f'sft.data.files={tmp_path / "chat.jsonl"}', f'rl.data.files={tmp_path / "problems.jsonl"}',
        config=tmp_path / 'config.py') == 0
  assert 'fg2_plus, auto: chunked, chunks of 16 tokens' in said.getvalue()
  lines = metrics.read_metrics(workdir)
  assert [(x['phase'], x['step']) for x in lines if 'loss' in x] == [
      ('pretrain', 1), ('pretrain', 2), ('sft', 3), ('sft', 4), ('rl', 5), ('rl', 6)]
  assert all(0 <= x['load/violation'] < 8 for x in lines if 'loss' in x)
  assert all(x['parity'] < 1e-5 for x in lines if x['phase'] == 'rl' and 'parity' in x)

  said = io.StringIO()
  with contextlib.redirect_stdout(said):
    generate.main(['--workdir', str(workdir), '--prompt', 'one and one is', '--max_tokens', '4'])
  assert said.getvalue().endswith('\n') and said.getvalue().strip()

  score.main(['--model', str(workdir), '--input', str(tmp_path / 'chat.jsonl'),
              '--output', str(tmp_path / 'scored.jsonl')])
  row = json.loads((tmp_path / 'scored.jsonl').read_text())
  at = row['tokens'].index(100)
  assert row['tokens'][at:at + 3] == [100, 101, 1] and None not in row['logp'][at:at + 3]
