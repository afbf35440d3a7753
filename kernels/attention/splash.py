"""Causal attention on TPU by jax's splash kernel.

B rows, T positions, H query heads, G key/value heads, K head size, V size of a value (often K).

The kernel skips blocks of keys that lie ahead or before the window, reads each key head once for
the queries that share it, and recomputes the weights backward. It wants whole blocks of positions:
rows are padded with segment 0.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES = 128                            # the smallest block of positions
BLOCK = 512                            # the largest: more no longer pays, and scores must fit VMEM


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segments: jax.Array, scale: float,
    window: int = 0, interpret: bool = False,
) -> jax.Array:
  """As `reference.attention`. interpret: run the kernel's program by XLA, on any platform."""
  length, num_heads = q.shape[1:3]
  pad = -length % (LANES if length <= BLOCK else BLOCK)
  size = min(length + pad, BLOCK)
  to_blocks = lambda x: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, pad), (0, 0)))
  ids = jnp.pad(segments, ((0, 0), (0, pad)))
  shape = (length + pad, length + pad)
  seen = lambda: (
      masks.LocalMask(shape, (window - 1, 0), offset=0) if window else masks.CausalMask(shape))
  mask = masks.MultiHeadMask([seen() for _ in range(num_heads)])
  sizes = splash.BlockSizes(
      block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size,
      block_kv_dq=size)
  kernel = splash.make_splash_mha(
      mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
  out = jax.vmap(kernel)(
      to_blocks((q * scale).astype(q.dtype)), to_blocks(k), to_blocks(v),
      splash.SegmentIds(q=ids, kv=ids))
  # Padding positions see one another in the kernel.
  return jnp.where(segments[:, :, None, None] != 0, out[:, :, :length].swapaxes(1, 2), 0)
