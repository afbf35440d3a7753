"""Grouped matmul by batched matmuls on tiles of rows, for machines that want many at once: GPUs.

N rows, E groups, I inputs, O outputs, M tiles of C rows, S tiles at a time.

Every group is padded to whole tiles; N / C + E of them always suffice, so nothing is dropped and
shapes are static. A step gathers S tiles and the matrices of their groups. A matrix is thus read
and written once per tile of it, which at C rows costs less than the tile's products; only S
matrices lie in memory.
"""

import jax
import jax.numpy as jnp

from kernels.grouped_matmul import blocks, reference

ROWS = 128                             # C: of a tile
STEP = 32                              # S: tiles of a step
SUM_ROWS = 512                         # of a block in sums over rows: one matmul after the other


def most_tiles(num_rows: int, num_groups: int) -> int:
  """M: enough however the rows are spread over the groups, in whole steps."""
  return -(-(num_rows // ROWS + num_groups) // STEP) * STEP


def product(x: jax.Array, w: jax.Array, sizes: jax.Array, *, transposed: bool = False) -> jax.Array:
  """As `reference.product`."""
  num_rows, num_groups = len(x), len(w)
  num_tiles = most_tiles(num_rows, num_groups)
  ends, tiles = jnp.cumsum(sizes), -(-sizes // ROWS)
  last = jnp.cumsum(tiles)
  tile = jnp.arange(num_tiles)
  group = jnp.minimum(jnp.searchsorted(last, tile, side='right'), num_groups - 1)
  begin = (ends - sizes)[group] + (tile - (last - tiles)[group]) * ROWS
  source = begin[:, None] + jnp.arange(ROWS)           # [M, C]

  def step(one):
    group, source = one
    # What is not the group's own is not read again.
    rows = jnp.take(x, source, axis=0, mode='clip')
    return jnp.einsum(
        'sci,soi->sco' if transposed else 'sci,sio->sco', rows, jnp.take(w, group, axis=0))

  out = jax.lax.map(step, (group.reshape(-1, STEP), source.reshape(-1, STEP, ROWS)))
  mine = reference.owner(sizes, num_rows)
  safe = jnp.minimum(mine, num_groups - 1)
  target = (last - tiles)[safe] * ROWS + jnp.arange(num_rows) - (ends - sizes)[safe]
  out = jnp.take(out.reshape(num_tiles * ROWS, -1), target, axis=0, mode='clip')
  return jnp.where((mine < num_groups)[:, None], out, 0)


def weight_gradient(x: jax.Array, grad: jax.Array, sizes: jax.Array) -> jax.Array:
  """As `reference.weight_gradient`."""
  return blocks.sums(x, grad, sizes, SUM_ROWS)
