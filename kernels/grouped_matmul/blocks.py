"""Grouped matmul by plain matmuls on blocks of rows, in turn: what a CPU runs, and all else can.

N rows, E groups, I inputs, O outputs, C rows of a block.

Shapes are static and the number of blocks is not: a loop over the groups holds one over the blocks
of a group, so that the work is that of the rows there are and a group's matrix is read once. Blocks
are written in the order of the rows; what a group's last block writes behind its end is overwritten
by the next group.
"""

import jax
import jax.numpy as jnp

# Rows of a block, measured on one core: enough to keep a matmul busy, hardly more than a group has.
SMALLEST, SMALLEST_SUM, LARGEST = 16, 32, 64


def block_size(num_rows: int, num_groups: int, smallest: int) -> int:
  """C: a power of two, within the limits about half a group of average size."""
  return min(LARGEST, max(smallest, 1 << (num_rows // num_groups).bit_length() >> 2))


def product(x: jax.Array, w: jax.Array, sizes: jax.Array, *, transposed: bool = False) -> jax.Array:
  """As `reference.product`."""
  num_rows, size = len(x), block_size(len(x), len(w), SMALLEST)
  x = jnp.pad(x, ((0, size), (0, 0)))

  def group(out, one):
    matrix, start, end = one

    def block(c, out):
      begin = start + c * size
      rows = jax.lax.dynamic_slice_in_dim(x, begin, size)
      y = jax.lax.dot_general(rows, matrix, (((1,), (1 if transposed else 0,)), ((), ())))
      return jax.lax.dynamic_update_slice_in_dim(out, y, begin, 0)

    return jax.lax.fori_loop(0, -(-(end - start) // size), block, out), None

  ends = jnp.cumsum(sizes)
  out = jnp.zeros((num_rows + size, w.shape[1 if transposed else 2]), x.dtype)
  out, _ = jax.lax.scan(group, out, (w, ends - sizes, ends))
  return jnp.where((jnp.arange(num_rows) < ends[-1])[:, None], out[:num_rows], 0)


def weight_gradient(x: jax.Array, grad: jax.Array, sizes: jax.Array) -> jax.Array:
  """As `reference.weight_gradient`.

  A group's sum is formed by itself: no array of all groups is added to per block.
  """
  return sums(x, grad, sizes, block_size(len(x), len(sizes), SMALLEST_SUM))


def sums(x: jax.Array, grad: jax.Array, sizes: jax.Array, size: int) -> jax.Array:
  """weight_gradient with blocks of `size` rows."""
  x, grad = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, grad))

  def group(one):
    start, end = one

    def block(c):
      begin = start + c * size
      mine = (begin + jnp.arange(size) < end)[:, None]
      # Of both: what is not a group's own may be anything, and 0 times infinity is not 0.
      rows, g = (
          jnp.where(mine, jax.lax.dynamic_slice_in_dim(a, begin, size), 0) for a in (x, grad))
      return jax.lax.dot_general(
          rows, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    # From the first block on, not from zeros: with many groups hardly any has a second one.
    return jax.lax.fori_loop(
        1, -(-(end - start) // size), lambda c, total: total + block(c), block(0))

  ends = jnp.cumsum(sizes)
  return jax.lax.map(group, (ends - sizes, ends))
