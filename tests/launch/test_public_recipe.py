"""The recipe for a public model, on a random one: read from a folder, trained on files in GSM8K's
format over eight devices, and written as a folder again.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import train_runs
from data import tokenizer as tokenizer_lib
from launch import checkpoint, hf_files, mesh
from launch import models as models_lib
from nn import hf, model, param

pytestmark = pytest.mark.usefixtures('cheap_compilation')

RECIPE = train_runs.ROOT / 'configs' / 'rl_gsm8k_qwen3.py'
CONFIG = {
    'architectures': ['Qwen3ForCausalLM'], 'model_type': 'qwen3', 'hidden_size': 16,
    'intermediate_size': 24, 'num_hidden_layers': 4, 'num_attention_heads': 8,
    'num_key_value_heads': 4, 'head_dim': 8, 'hidden_act': 'silu', 'max_position_embeddings': 4096,
    'rms_norm_eps': 1e-6, 'rope_theta': 1e6, 'tie_word_embeddings': True, 'dtype': 'bfloat16',
    'attention_bias': False, 'use_sliding_window': False}
RIGHT = '\\boxed{42}'                  # one token here, so that a random model says it at times
SPECIALS = ['<|im_start|>', '<|im_end|>', RIGHT]
TINY = ('rl.steps=2', 'rl.prompts=4', 'rl.group=4', 'rl.max_prompt=64', 'rl.max_tokens=4',
        'rl.microbatches=2', 'rl.graders=1', 'rl.optimizer.learning_rate=0.01',
        'rl.optimizer.warmup=0')


def write_tokenizer(folder):
  """A byte-level BPE of a few merges with the special tokens of Qwen's chats; returns it."""
  folder.mkdir()
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  said = 'user\nHow many? Reason step by step, and put the answer into \\boxed{}. assistant\n'
  made.train_from_iterator([said] * 20, trainers.BpeTrainer(
      vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
      special_tokens=SPECIALS[:2]))
  made.add_tokens([RIGHT])
  made.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text('{"eos_token": "<|im_end|>"}')
  return made


def write_public(folder, tokenizer):
  """A Qwen3 of four layers as published, but random; returns its model config."""
  made = write_tokenizer(tokenizer)
  config = CONFIG | {'vocab_size': -(-made.get_vocab_size() // 8) * 8,
                     'eos_token_id': made.token_to_id('<|im_end|>')}
  cfg, rng = hf.model_config(config), np.random.default_rng(0)
  specs = param.flat(model.specs(cfg))

  def draw(path):
    x = rng.standard_normal(specs[path].shape).astype(np.float32)
    if path != 'embed/table':
      return x * specs[path].shape[-1] ** -0.5
    x *= 0.3
    x[[made.token_to_id(token) for token in SPECIALS[1:]]] *= 4
    return x

  origin = hf_files.Origin(config, {'temperature': 0.6}, 'BF16', {})
  hf_files.save(folder, cfg, draw, origin=origin, tokenizer=tokenizer)
  return cfg


def test_the_recipe_trains_and_exports_a_public_model(tmp_path):
  public, workdir, out = (tmp_path / name for name in ('public', 'run', 'out'))
  cfg = write_public(public, tmp_path / 'tokenizer')
  for name, rows in {'train': 6, 'test': 2}.items():
    (tmp_path / f'{name}.jsonl').write_text(''.join(
        json.dumps({'question': f'How many {i}?', 'answer': f'It is 6 * 7.\n#### {40 + i % 3}'})
        + '\n' for i in range(2, 2 + rows)))
  assert train_runs.run(
      workdir, *TINY, f'init={public}', f'model_from={public}', f'tokenizer={public}',
      f'export={out}', f'rl.data.files={tmp_path / "train.jsonl"}',
      f'rl.data.heldout_files={tmp_path / "test.jsonl"}', config=RECIPE) == 0

  steps, ends = train_runs.logged(workdir), train_runs.logged(workdir, evaluations=True)
  assert [*steps] == [('rl', 1), ('rl', 2)] and ends['rl', 2]['eval/problems'] == 2
  assert all(np.isfinite(x['loss']) and x['rows_missing'] < 16 for x in steps.values()), steps
  assert models_lib.describe(out) == models_lib.describe(public)._replace(tokenizer=str(out))
  tokenizers_of = [tokenizer_lib.load(str(folder)).fingerprint() for folder in (public, out)]
  assert tokenizers_of[0] == tokenizers_of[1]

  # What was exported is the last checkpoint, rounded to the folder's bfloat16 once.
  sizes = {'data': 1, 'fsdp': 2, 'expert': 1, 'model': 4}
  abstract = param.abstract(model.specs(cfg), param.shardings(
      model.specs(cfg), mesh.make_mesh(sizes), dict(cfg.rules)))
  load = lambda path: param.flat(checkpoint.load_params(path, abstract, cfg))
  before, kept, after = load(public), load(workdir), load(out)
  for name, x in after.items():
    assert (x != before[name]).any(), name
    np.testing.assert_array_equal(x, kept[name].astype(jnp.bfloat16).astype(jnp.float32))
