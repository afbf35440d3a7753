"""A small random Qwen3 in a folder as published, with a tokenizer."""

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from launch import hf_files
from nn import hf, model, param

CONFIG = {
    'architectures': ['Qwen3ForCausalLM'], 'model_type': 'qwen3', 'hidden_size': 16,
    'intermediate_size': 24, 'num_hidden_layers': 4, 'num_attention_heads': 8,
    'num_key_value_heads': 4, 'head_dim': 8, 'hidden_act': 'silu', 'max_position_embeddings': 4096,
    'rms_norm_eps': 1e-6, 'rope_theta': 1e6, 'tie_word_embeddings': True, 'dtype': 'bfloat16',
    'attention_bias': False, 'use_sliding_window': False}
SPECIALS = ['<|im_start|>', '<|im_end|>']
RIGHT = '\\boxed{42}'
# One token each. Where one is unlikely the other is likely: the model says either now and then.
ANSWERS = [RIGHT, f'{RIGHT}.']


def write_tokenizer(folder):
  """A byte-level BPE of a few merges with the special tokens of Qwen's chats; returns it."""
  folder.mkdir()
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  said = 'user\nHow many? Reason step by step, and put the answer into \\boxed{}. assistant\n'
  made.train_from_iterator([said] * 20, trainers.BpeTrainer(
      vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
      special_tokens=SPECIALS))
  made.add_tokens(ANSWERS)
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
    if path == 'embed/table':
      one, other = map(made.token_to_id, ANSWERS)
      x[one] *= 4
      x[other] = -x[one]
      return 0.3 * x
    return 1 + 0.1 * x if 'norm' in path else x * specs[path].shape[-1] ** -0.5

  origin = hf_files.Origin(config, {'temperature': 0.6}, 'BF16', {})
  hf_files.save(folder, cfg, draw, origin=origin, tokenizer=tokenizer)
  return cfg
