"""Reading and changing one layer's part of a decoding state.

Layers that stand alone have arrays of their own. Layers under a scan share arrays with a leading
axis of layers, which the scan carries and changes in place; a scan over per-layer states would copy
all of them for every token.
"""

from collections.abc import Sequence

import jax

Place = int | jax.Array | None         # of a layer in shared arrays; None: the arrays are its own


def read(array: jax.Array, at: Place) -> jax.Array:
  """The layer's part: [layers, ...] -> [...], or the array itself."""
  return array if at is None else jax.lax.dynamic_index_in_dim(array, at, keepdims=False)


def write(
    array: jax.Array, new: jax.Array, start: Sequence[int | jax.Array], at: Place,
) -> jax.Array:
  """The array with `new` put into the layer's part, from `start` on."""
  if at is None:
    return jax.lax.dynamic_update_slice(array, new, start)
  return jax.lax.dynamic_update_slice(array, new[None], (at, *start))
