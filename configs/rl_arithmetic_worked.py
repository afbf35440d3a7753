"""The main job with answers that show their work: '7+8+0=15,3+4+1=08#550' for 37+48, a dozen tokens and more.

    python launch/train.py --config configs/rl_arithmetic_worked.py --workdir runs/worked

The reward is still only whether the number behind the last '#' is right.
"""

from configs.rl_arithmetic import get_config as main_job


def get_config():
  c = main_job()
  c.arithmetic.worked = True
  c.sft.length = 32
  c.rl.max_tokens = 24
  return c
