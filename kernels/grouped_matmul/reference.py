"""The definition: every row times its own group's matrix. N rows, E groups, I inputs, O outputs."""

import jax
import jax.numpy as jnp


def owner(sizes: jax.Array, num_rows: int) -> jax.Array:
  """The group of every row: [E] -> [N] int32; E for the rows behind the last group."""
  return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(num_rows), side='right')


def product(x: jax.Array, w: jax.Array, sizes: jax.Array, *, transposed: bool = False) -> jax.Array:
  """[N, I], [E, I, O], [E] -> [N, O]: every group times all rows, E times the work that is needed.

  Args:
    transposed: w is [E, O, I]. A platform need not turn all matrices round for it.
  """
  group = owner(sizes, len(x))[:, None]
  w = w.swapaxes(1, 2) if transposed else w

  def add(out, one):
    number, matrix = one
    return jnp.where(group == number, x @ matrix, out), None

  out = jnp.zeros((len(x), w.shape[2]), x.dtype)
  return jax.lax.scan(add, out, (jnp.arange(len(w)), w))[0]


def weight_gradient(x: jax.Array, grad: jax.Array, sizes: jax.Array) -> jax.Array:
  """[N, I], [N, O], [E] -> [E, I, O] float32: the sum over its rows of x_n grad_n'.

  Zero for an empty group.
  """
  group = owner(sizes, len(x))[:, None]

  def one(number):
    mine = group == number             # of both: 0 times infinity is not 0
    return jnp.matmul(
        jnp.where(mine, x, 0).T, jnp.where(mine, grad, 0), preferred_element_type=jnp.float32)

  return jax.lax.map(one, jnp.arange(len(sizes)))
