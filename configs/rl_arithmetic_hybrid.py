"""Worked arithmetic (see rl_arithmetic_worked.py), three FG2-GDN+ layers to one of attention.

    python launch/train.py --config configs/rl_arithmetic_hybrid.py --workdir runs/hybrid

Attention has no positions: the recurrence knows the order. docs/results.md has accuracy and time.
"""

from configs.rl_arithmetic_worked import get_config as worked


def get_config():
  c = worked()
  c.model.pattern = ('gdn', 'gdn', 'gdn', 'attention')
  c.model.repeats = 1
  c.model.rope_theta = 0.0
  c.rl.until = 'eval/accuracy>=0.95'
  return c
