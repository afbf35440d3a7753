"""The main job: a transformer of 0.3M parameters learns to add numbers of two digits, from nothing.

    python launch/train.py --config configs/rl_arithmetic.py --workdir runs/arithmetic

A short SFT warm-up on 1024 demonstrations, stopped while most answers are still wrong, then GRPO on
other problems, with nothing but "right" or "wrong" as reward. The held-out problems are in neither.
docs/results.md has accuracy and time.
The control, which must not learn: --config.rl.methods=shuffled_rewards,grpo
"""

from configs.base import get_config as base


def get_config():
  c = base()
  c.phases = ('sft', 'rl')

  c.arithmetic.digits = 2
  c.arithmetic.pad = True              # '07+48=' is answered '550': units first, as one adds
  c.arithmetic.backwards = True
  c.arithmetic.train = 3072
  c.arithmetic.demos = 1024
  c.arithmetic.heldout = 512

  c.model.embed_dim = 96
  c.model.num_heads = 4
  c.model.num_kv_heads = 2
  c.model.head_dim = 24
  c.model.ffw_dim = 256
  c.model.repeats = 3
  c.model.qk_norm = True
  c.model.unroll = True
  c.model.max_length = 64

  c.sft.steps = 400
  c.sft.until = 'eval/accuracy>=0.2'   # most answers are still wrong, whatever the seed
  c.sft.rows = 64
  c.sft.length = 16
  c.sft.optimizer.learning_rate = 2e-3
  c.sft.data.format = 'arithmetic'
  c.sft.data.pack = False

  c.rl.steps = 200
  c.rl.prompts = 64
  c.rl.group = 8
  c.rl.max_prompt = 8
  c.rl.max_tokens = 5
  c.rl.rewards.exact = 'exact'
  c.rl.grpo.beta = 0.0
  c.rl.data.format = 'arithmetic'
  c.rl.optimizer.learning_rate = 1e-3
  c.rl.optimizer.schedule = 'wsd'
  c.rl.optimizer.warmup = 10
  c.rl.optimizer.decay = 80

  c.eval.every = 10
  c.checkpoint.every = 60
  return c
