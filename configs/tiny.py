"""The smallest run that has everything: SFT, then RL, on sums of one digit. For tests and trials.

    python launch/train.py --config configs/tiny.py --workdir runs/tiny

Half a minute on 2 cores, most of it compiling. It is too short to learn anything.
"""

from configs.base import get_config as base


def get_config():
  c = base()
  c.phases = ('sft', 'rl')
  c.arithmetic.digits = 1
  c.arithmetic.train = 24
  c.arithmetic.demos = 15
  c.arithmetic.heldout = 16

  c.model.embed_dim = 16
  c.model.num_heads = 2
  c.model.num_kv_heads = 1
  c.model.head_dim = 8
  c.model.ffw_dim = 32
  c.model.repeats = 2
  c.model.max_length = 32

  c.sft.steps = 4
  c.sft.rows = 8
  c.sft.length = 16
  c.sft.data.format = 'arithmetic'

  c.rl.steps = 4
  c.rl.prompts = 4
  c.rl.group = 4
  c.rl.max_prompt = 8
  c.rl.max_tokens = 4
  c.rl.rewards.exact = 'exact'
  c.rl.rewards.digits = 'digits'
  c.rl.grpo.beta = 0.01
  c.rl.data.format = 'arithmetic'

  c.eval.every = 2
  c.eval.reward = 'exact'
  c.checkpoint.every = 2
  c.checkpoint.keep = 20
  c.log.samples_every = 2
  return c
