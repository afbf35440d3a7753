"""The main job with answers that show their work: '7+8+0=15,3+4+1=08#550' for 37+48.

    python launch/train.py --config configs/rl_arithmetic_worked.py --workdir runs/worked

An answer is a dozen tokens and more. The reward is still only whether the number behind the last
'#' is right. One wrong token of twenty spoils an answer, so few samples are rewarded at first, and
the learning rate at which the main job learns would undo the warm-up.
"""

from configs.rl_arithmetic import get_config as main_job


def get_config():
  c = main_job()
  c.arithmetic.worked = True
  c.sft.length = 32
  c.rl.steps = 450
  c.rl.max_tokens = 24
  c.rl.optimizer.learning_rate = 3.5e-4
  c.rl.optimizer.decay = 150
  return c
