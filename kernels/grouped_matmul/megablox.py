"""Grouped matmul on TPU by jax's megablox kernels. N rows, E groups, I inputs, O outputs.

The kernels visit the tiles of rows there are and skip the others. What they do not visit they do
not write: rows behind the last group are set to zero here.
"""

import jax
import jax.numpy as jnp
# Names, since the package hides the module behind its function of the same name.
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

# Of a tile, at most: two of each array in flight fit every chip's VMEM in float32.
ROWS, WIDTH = 512, 512
SMALLEST = 128


def tiling(num_rows: int, num_groups: int, inputs: int, outputs: int) -> tuple[int, int, int]:
  """Rows, inputs and outputs of a tile.

  Tiles of rows larger than groups would be gone through once per group.
  """
  rows = min(ROWS, max(SMALLEST, 1 << max(num_rows // num_groups, 1).bit_length() - 1))
  return rows, min(WIDTH, inputs), min(WIDTH, outputs)


def product(
    x: jax.Array, w: jax.Array, sizes: jax.Array, *, transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
  """As `reference.product`. interpret: run the kernel's program by XLA, on any platform."""
  num_rows, outputs = len(x), w.shape[1 if transposed else 2]
  tile = tiling(num_rows, len(w), x.shape[1], outputs)
  x = jnp.pad(x, ((0, -num_rows % tile[0]), (0, 0)))
  out = gmm(x, w, sizes, x.dtype, tile, transpose_rhs=transposed, interpret=interpret)[:num_rows]
  return jnp.where((jnp.arange(num_rows) < jnp.sum(sizes))[:, None], out, 0)


def weight_gradient(
    x: jax.Array, grad: jax.Array, sizes: jax.Array, *, interpret: bool = False,
) -> jax.Array:
  """As `reference.weight_gradient`."""
  tile = tiling(len(x), len(sizes), x.shape[1], grad.shape[1])
  x, grad = (jnp.pad(a, ((0, -len(a) % tile[0]), (0, 0))) for a in (x, grad))
  return tgmm(x.swapaxes(0, 1), grad, sizes, jnp.float32, tile, interpret=interpret)
