"""SFT, then GRPO, on files in GSM8K's own format: a JSON object per line, question and answer.

    python launch/train.py --config configs/rl_gsm8k.py --workdir runs/gsm8k \
        --config.sft.data.files=train.jsonl --config.rl.data.files=train.jsonl \
        --config.sft.data.heldout_files=test.jsonl --config.rl.data.heldout_files=test.jsonl

A model of this size, read byte by byte, solves no problem of GSM8K: what it can learn is to end
with a line "#### number", which the second reward pays for. docs/results.md has time and numbers.
For a model that can solve some, set the sizes, `tokenizer` and `init`, and drop the second reward.
"""

from configs.base import get_config as base


def get_config():
  c = base()
  c.phases = ('sft', 'rl')

  c.model.embed_dim = 128
  c.model.num_heads = 4
  c.model.num_kv_heads = 2
  c.model.head_dim = 32
  c.model.ffw_dim = 384
  c.model.repeats = 4
  c.model.qk_norm = True
  c.model.unroll = True
  c.model.max_length = 768

  for data in (c.sft.data, c.rl.data):
    data.prompt = 'question'
    data.prompt_template = '{question}\n'
    data.skip_long_rows = True
  c.sft.data.response = 'answer'
  c.rl.data.answer = 'answer'

  c.sft.steps = 300
  c.sft.rows = 16
  c.sft.length = 768
  c.sft.optimizer.learning_rate = 3e-3
  c.sft.optimizer.schedule = 'wsd'
  c.sft.optimizer.warmup = 20
  c.sft.optimizer.decay = 60

  c.rl.steps = 50
  c.rl.prompts = 8
  c.rl.group = 8
  c.rl.max_prompt = 320
  c.rl.max_tokens = 256
  c.rl.rewards.math = 'math'
  c.rl.rewards.form = 'number'
  c.rl.reward_weights.form = 0.1
  c.rl.grpo.beta = 0.0
  c.rl.optimizer.learning_rate = 3e-4
  c.rl.graders = 2

  c.eval.every = 150
  c.eval.reward = 'math'
  c.eval.rows = 64
  c.checkpoint.every = 25
  return c
