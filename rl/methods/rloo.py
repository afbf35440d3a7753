"""RLOO (arXiv:2402.14740): REINFORCE with the other samples of the prompt as baseline."""

from rl import pieces
from rl.compose import compose
from rl.types import Method


def rloo(clip_low: float = 0.2, clip_high: float = 0.2) -> Method:
  """Minus advantage times the whole row's log-probability, hence sequence_sum.

  In the first update of a rollout batch the clipped ratio has the same gradient; it makes further
  updates safe. The paper's KL penalty is listed beside it, as `kl`.
  """
  return compose(
      pieces.leave_one_out(),
      pieces.policy(clip_low=clip_low, clip_high=clip_high, aggregate='sequence_sum'))
