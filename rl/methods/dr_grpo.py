"""Dr. GRPO (arXiv:2503.20783): GRPO without the divisions that favour long wrong answers and very
easy or hard prompts.
"""

from rl import pieces
from rl.compose import compose
from rl.types import Method


def dr_grpo(max_tokens: int, clip_low: float = 0.2, clip_high: float = 0.2) -> Method:
  """The paper's recipe. max_tokens: divides every row's sum, instead of its own length."""
  return compose(
      pieces.centred_advantage(),
      pieces.policy(clip_low=clip_low, clip_high=clip_high, aggregate='constant',
                    max_tokens=max_tokens))
