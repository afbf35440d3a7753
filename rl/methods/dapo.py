"""DAPO (arXiv:2503.14476): GRPO with room above, all tokens alike, and only prompts that teach."""

from rl import pieces
from rl.compose import compose
from rl.types import Method


def dapo(max_tokens: int, clip_low: float = 0.2, clip_high: float = 0.28, eps: float = 1e-4,
         share: float = 0.2, factor: float = 1.0) -> Method:
  """The paper's recipe. share, factor: of the length penalty, see `pieces.overlong`; 0: none."""
  return compose(
      pieces.overlong(max_tokens, share=share, factor=factor),
      pieces.mixed_groups(),
      pieces.group_advantage(eps=eps),
      pieces.policy(clip_low=clip_low, clip_high=clip_high, aggregate='token_mean'))
