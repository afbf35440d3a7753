"""Rows sorted by group, times the matrix of their group: what mixtures of experts are made of.

N rows, E groups (experts), I inputs, O outputs.
"""

from kernels.grouped_matmul.dispatch import IMPLEMENTATIONS, choose, grouped_matmul

__all__ = ['IMPLEMENTATIONS', 'choose', 'grouped_matmul']
