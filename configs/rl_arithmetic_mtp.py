"""Worked sums by a model that also predicts the token after the next, with OCC (arXiv:2605.28184).

    python launch/train.py --config configs/rl_arithmetic_mtp.py --workdir runs/mtp

SFT trains the head with the model. In RL the policy loss is taken of the head, too, with a
coefficient estimated anew every update (Optimal Coefficient Calibration); on the first update of a
rollout batch it is 0, hence four. What the head itself learns is always what was sampled, too
(--config.rl.mtp_occ.train). The other regimes, to compare:
--config.rl.methods=grpo,mtp_detach (or mtp_ce, or mtp_policy with --config.rl.mtp_policy.coef=0.1).
The log has the coefficient as mtp_occ/lambda1, and mtp/agrees1, how often the head drafts what the
model would say.
"""

from configs.rl_arithmetic_worked import get_config as worked


def get_config():
  c = worked()
  c.model.mtp.depth = 1
  c.sft.mtp.coef = 0.3
  c.sft.until = 'eval/accuracy>=0.4'
  c.rl.steps = 150
  c.rl.parts = 4
  c.rl.optimizer.learning_rate = 2e-4  # at 3.5e-4 four updates a batch undo the warm-up
  c.rl.optimizer.decay = 50
  c.rl.methods = ('grpo', 'mtp_occ')
  return c
