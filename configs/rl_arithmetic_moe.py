"""The main job with a mixture of experts that grows: FG2-GDN+ and attention in turn, 4 experts of which a token takes 2.

    python launch/train.py --config configs/rl_arithmetic_moe.py --workdir runs/arithmetic_moe

In the middle of SFT every expert is copied (arXiv:2604.19835), so that GRPO trains 8; the policy's forward takes the
experts that the sampler took. docs/results.md has accuracy and time.
"""

from configs.rl_arithmetic import get_config as arithmetic


def get_config():
  c = arithmetic()
  c.model.pattern = ('gdn', 'attention')
  c.model.repeats = 1
  c.model.tail = ('gdn',)
  c.model.gdn.num_heads = 2
  c.model.gdn.key_dim = 24
  c.model.gdn.value_dim = 48
  c.model.ffn = 'moe'
  c.model.moe.experts = 4
  c.model.moe.top_k = 2
  c.model.moe.scores = 'sigmoid'
  c.model.moe.bias_rate = 1e-3
  c.upcycle.at_step = 100
  c.rl.routing_replay = True
  return c
