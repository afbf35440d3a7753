"""A model small enough to differentiate in a second, and batches for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nn import model
from nn.config import MLA, ModelConfig
from nn.types import Batch


def config(**changes) -> ModelConfig:
  """A layer that stands alone and two under the scan."""
  sizes = dict(
      vocab_size=40, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, ffw_dim=24,
      max_length=256)
  return ModelConfig(**(sizes | dict(head=('attention',), repeats=2, qk_norm=True) | changes))


# Every part of a stack, and two layers in the repeated pattern.
FULL_STACK = dict(pattern=('attention', ('attention', 'mlp')), tail=('attention',))

# Every layer with latent attention: keys of 4 + 2 channels, values of 6, latents of 5 and 7.
LATENT = dict(
    head=('mla',), pattern=('mla',), mla=MLA(q_rank=5, kv_rank=7, rope_dim=2, value_dim=6))


def params(cfg: ModelConfig, seed: int = 0) -> dict:
  """Parameters of visible size, gains included.

  With those of `init` most mistakes would drown in the residual.
  """
  rng = np.random.default_rng(seed)
  def draw(spec):
    return jnp.asarray(rng.standard_normal(spec.shape) * 0.4 + (len(spec.shape) < 2), jnp.float32)
  return jax.tree.map(draw, model.specs(cfg))


def batch(tokens, segments=None, **fields) -> Batch:
  """A batch of rows [B, T]; positions count from 0 in every segment."""
  tokens = np.asarray(tokens)
  segments = np.ones_like(tokens) if segments is None else np.asarray(segments)
  positions = np.zeros_like(tokens)
  for t in range(1, tokens.shape[1]):
    positions[:, t] = np.where(segments[:, t] == segments[:, t - 1], positions[:, t - 1] + 1, 0)
  as_int = lambda x: jnp.asarray(x, jnp.int32)
  defaults = dict(
      masks={}, weights={}, coef={}, data={}, temperature=jnp.float32(1), use=jnp.int32(0))
  return Batch(tokens=as_int(tokens), positions=as_int(positions), segments=as_int(segments),
               **(defaults | fields))


def tokens(rows: int, length: int, vocab_size: int = 40, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, vocab_size, (rows, length))


@functools.partial(jax.jit, static_argnums=1)
def forward(params: dict, cfg: ModelConfig, rows: Batch):
  return model.forward(params, cfg, rows.tokens, rows.positions, rows.segments)


def reached(cfg: ModelConfig, position: int) -> np.ndarray:
  """Which ids the state at a position of the row 0, 1, ... 11 depends on: [V] bool."""
  given, rows = params(cfg), batch(np.arange(12)[None])

  def reading(table):
    return jnp.sum(forward(given | {'embed': {'table': table}}, cfg, rows).hidden[0, position] ** 3)

  return np.abs(jax.jit(jax.grad(reading))(given['embed']['table'])).max(axis=1) > 0
