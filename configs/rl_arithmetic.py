from configs.base import get_config as base


def get_config():
  c = base()
  c.phases = ('sft', 'rl')
  c.arithmetic.digits = 2
  c.arithmetic.train = 3000
  c.arithmetic.demos = 600
  c.arithmetic.heldout = 512
  c.model.embed_dim = 96
  c.model.num_heads = 4
  c.model.num_kv_heads = 2
  c.model.head_dim = 24
  c.model.ffw_dim = 256
  c.model.repeats = 3
  c.model.unroll = True
  c.model.qk_norm = True
  c.model.max_length = 64

  c.sft.data.format = 'arithmetic'
  c.sft.data.pack = False
  c.sft.steps = 300
  c.sft.rows = 64
  c.sft.length = 16
  c.sft.optimizer.learning_rate = 2e-3

  c.rl.data.format = 'arithmetic'
  c.rl.rewards.exact = 'exact'
  c.rl.steps = 200
  c.rl.prompts = 64
  c.rl.group = 8
  c.rl.max_prompt = 7
  c.rl.max_tokens = 5
  c.rl.grpo.beta = 0.0
  c.rl.optimizer.learning_rate = 1e-3
  c.eval.every = 50
  return c
