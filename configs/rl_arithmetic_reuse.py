"""The main job with every rollout batch used up to four times, and a gate on reuse gone wrong.

    python launch/train.py --config configs/rl_arithmetic_reuse.py --workdir runs/reuse

The gate is DGG (arXiv:2605.19425). Without it, all four uses whatever happens:
--config.rl.gate.window=0. The log and the report show the norm of the head's gradient, the policy's
shift and how many updates a batch gave.
"""

from configs.rl_arithmetic import get_config as arithmetic


def get_config():
  c = arithmetic()
  c.rl.uses = 4
  c.rl.watch = True
  c.rl.gate.window = 32
  c.rl.gate.threshold = 0.5
  return c
