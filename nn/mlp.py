"""The dense feed-forward layer, gated by SiLU or GELU (arXiv:2002.05202).

B rows, T positions, D model width, F inner width.
"""

import functools

import jax

from nn import param
from nn.config import ModelConfig
from nn.linear import linear
from nn.param import Spec

ACTIVATIONS = {'silu': jax.nn.silu, 'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True)}


def specs(cfg: ModelConfig) -> dict[str, Spec]:
  sizes = {'embed': cfg.embed_dim, 'ffw': cfg.ffw_dim}
  return {
      'gate': param.matrix(sizes, ('embed', 'ffw'), contract=('embed',)),
      'up': param.matrix(sizes, ('embed', 'ffw'), contract=('embed',)),
      'down': param.matrix(sizes, ('ffw', 'embed'), contract=('ffw',),
                           scale=(2 * len(cfg.layers)) ** -0.5),
  }


def apply(
    params: dict, cfg: ModelConfig, x: jax.Array, segments: jax.Array,
) -> tuple[jax.Array, dict]:
  """down(act(gate(x)) * up(x)).

  Args:
    x: [B, T, D] in the compute dtype.

  Returns:
    [B, T, D], and {}: nothing else to report.
  """
  del segments
  inner = ACTIVATIONS[cfg.activation](linear(x, params['gate'])) * linear(x, params['up'])
  inner = param.constrain(inner, cfg.rules, 'batch', 'time', 'ffw')
  return linear(inner, params['down']), {}


def flops(cfg: ModelConfig, length: int) -> int:
  """Floating point operations of the forward pass, per token."""
  del length
  return 2 * 3 * cfg.embed_dim * cfg.ffw_dim
