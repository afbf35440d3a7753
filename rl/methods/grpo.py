"""GRPO (arXiv:2402.03300): a sample is good if it beats the other samples of its prompt."""

from rl import pieces
from rl.compose import compose
from rl.types import Method


def grpo(clip_low: float = 0.2, clip_high: float = 0.2, eps: float = 1e-4,
         beta: float = 0.04) -> Method:
  """The paper's recipe.

  eps: added to the group's standard deviation. beta: coefficient of the k3 KL to the reference.
  """
  return compose(
      pieces.group_advantage(eps=eps),
      pieces.policy(clip_low=clip_low, clip_high=clip_high, aggregate='sequence_mean'),
      pieces.kl('k3', coef=beta))
