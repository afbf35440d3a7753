"""Causal self-attention with grouped key/value heads and packed segments, behind one signature.

B rows, T positions, H query heads, G key/value heads, K head size, V size of a value (often K), L
cache slots.
"""

from kernels.attention.dispatch import IMPLEMENTATIONS, Axes, attention, choose, platform
from kernels.attention.decode import decode_attention

__all__ = ['IMPLEMENTATIONS', 'Axes', 'attention', 'choose', 'decode_attention', 'platform']
