"""Causal attention on GPU by jax's fused Triton kernel.

B rows, T positions, H query heads, G key/value heads, K head size, V size of a value (often K).

Of the fused kernels at hand this one takes segments, has a backward pass, needs nothing but jax,
and compiles ahead of time. Mosaic GPU's has neither segments nor a causal backward pass; cuDNN's
needs cuDNN to compile and the segments as a [T, T] bias; tokamax's brings ten packages and pins of
theirs. It wants whole blocks of positions, as many key heads as query heads, and K = V: rows are
padded with segment 0, keys repeated, and the narrower of keys and values gets channels of 0. jax
0.11 still has it but calls it deprecated: this file goes to another kernel when jax 0.12 is
allowed.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# Of a block of queries: with more, the blocks in flight overflow shared memory.
TILE_BYTES = 2**15
SMALLEST, LARGEST = 32, 128            # positions of a block; the backward pass has the smallest


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segments: jax.Array, scale: float,
    interpret: bool = False,
) -> jax.Array:
  """As `reference.attention`. interpret: run the kernel's program by XLA, on any platform."""
  # Here, because jax 0.11 warns at its import, which only a GPU needs.
  from jax.experimental.pallas.ops.gpu import attention as fused

  length, ratio, value_dim = q.shape[1], q.shape[2] // k.shape[2], v.shape[3]
  size = max(q.shape[3], value_dim)
  block = min(LARGEST, TILE_BYTES // (pl.next_power_of_2(size) * q.dtype.itemsize),
              pl.next_power_of_2(length))
  block = max(block, SMALLEST)
  pad = -length % block
  to_blocks = lambda x: jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, size - x.shape[3])))
  ids = jnp.pad(segments, ((0, 0), (0, pad)))
  sizes = fused.BlockSizes(
      block_q=block, block_k=block, block_q_dkv=SMALLEST, block_kv_dkv=SMALLEST,
      block_q_dq=SMALLEST, block_kv_dq=SMALLEST)
  out = fused.mha(
      to_blocks(q), to_blocks(jnp.repeat(k, ratio, axis=2)),
      to_blocks(jnp.repeat(v, ratio, axis=2)), ids,
      sm_scale=scale, causal=True, block_sizes=sizes, interpret=interpret)
  # Padding positions see one another in the kernel.
  return jnp.where(segments[:, :, None, None] != 0, out[:, :length, :, :value_dim], 0)
