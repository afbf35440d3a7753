"""The product of activations with a weight array, and its two gradients.

I inputs and O outputs, of any number of axes.

Differentiating `x @ w` transposes the weight's gradient, which costs XLA on CPU a copy of the
activations and a slow product, a quarter of a train step; and it rounds that gradient to the
compute dtype. Both are avoided here.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, w: jax.Array, num_inputs: int = 1) -> jax.Array:
  """Sums over the last `num_inputs` axes of x and the first of w.

  Args:
    x: [..., I] in the compute dtype.
    w: [I, O] float32, rounded to the compute dtype for the products.

  Returns:
    [..., O] in x's dtype. The gradient of w is summed and kept in float32.
  """
  return _forward(x, w, num_inputs)[0]


def _forward(x, w, num_inputs):
  # The product itself, not a call of `linear`: a remat policy looks for products.
  return jnp.tensordot(x, w.astype(x.dtype), num_inputs), (x, w)


def _backward(num_inputs, residuals, grad):
  x, w = residuals
  num_outputs, num_lead = w.ndim - num_inputs, x.ndim - num_inputs
  last = list(range(-num_outputs, 0))
  dx = jnp.tensordot(grad, w.astype(x.dtype), (last, last))
  lead = list(range(num_lead))
  return dx, jnp.tensordot(
      x, grad, (lead, lead), preferred_element_type=jnp.float32).astype(w.dtype)


linear.defvjp(_forward, _backward)


@jax.custom_vjp
def logits(x: jax.Array, table: jax.Array) -> jax.Array:
  """The product with a table of one vector per output.

  Args:
    x: [..., D] in the compute dtype.
    table: [V, D] float32, rounded to the compute dtype for the products.

  Returns:
    [..., V] float32. The gradient of the table is summed and kept in float32.
  """
  return _logits_forward(x, table)[0]


def _logits_forward(x, table):
  product = jnp.einsum(
      '...d,vd->...v', x, table.astype(x.dtype), preferred_element_type=jnp.float32)
  return product, (x, table)


def _logits_backward(residuals, grad):
  x, table = residuals
  grad = grad.astype(x.dtype)
  dx = jnp.einsum('...v,vd->...d', grad, table.astype(x.dtype))
  dtable = jnp.einsum('...v,...d->vd', grad, x, preferred_element_type=jnp.float32)
  return dx, dtable.astype(table.dtype)


logits.defvjp(_logits_forward, _logits_backward)
