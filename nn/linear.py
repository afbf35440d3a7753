"""The product of activations with a weight array, and its two gradients.

I inputs and O outputs, of any number of axes.

A matrix may be `Adapted`: a part that stays and one that is trained. Its gradient is that of the
two small arrays, made without the gradient of the whole matrix, which would cost a third of the
step and, where rows are split over devices, a sum over all of them.

Differentiating `x @ w` transposes the weight's gradient, which costs XLA on CPU a copy of the
activations and a slow product, a quarter of a train step; and it rounds that gradient to the
compute dtype. Both are avoided here.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Adapted:
  """w + scale * a b, in place of an array in the parameters of a layer; see `nn/lora.py`.

  The sum is rounded to the compute dtype, not its parts: the trainer computes what a sampler with
  the merged matrix does, in any dtype.
  """
  w: jax.Array                         # [*lead, I, O] float32
  a: jax.Array                         # [*lead, I, R] float32
  b: jax.Array                         # [*lead, R, O] float32
  scale: float = flax.struct.field(pytree_node=False)

  def merged(self) -> jax.Array:
    """[*lead, I, O] float32."""
    num_lead = self.a.ndim + self.b.ndim - self.w.ndim - 2
    lead = tuple(range(num_lead))
    return self.w + self.scale * jax.lax.dot_general(
        self.a, self.b, (((self.a.ndim - 1,), (num_lead,)), (lead, lead)), precision='highest')

  def astype(self, dtype) -> jax.Array:
    """As of an array: what layers read matrices through."""
    return self.merged().astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, w: jax.Array | Adapted, num_inputs: int = 1) -> jax.Array:
  """Sums over the last `num_inputs` axes of x and the first of w.

  Args:
    x: [..., I] in the compute dtype.
    w: [I, O] float32, rounded to the compute dtype for the products.

  Returns:
    [..., O] in x's dtype. The gradient of w is summed and kept in float32; of an Adapted only a and
    b have one.
  """
  return _forward(x, w, num_inputs)[0]


def _forward(x, w, num_inputs):
  # The product itself, not a call of `linear`: a remat policy looks for products.
  return jnp.tensordot(x, w.astype(x.dtype), num_inputs), (x, w)


def _backward(num_inputs, residuals, grad):
  x, w = residuals
  num_lead = x.ndim - num_inputs
  last = list(range(num_lead - grad.ndim, 0))
  lead = list(range(num_lead))

  def weight_gradient(x, grad, dtype):
    return jnp.tensordot(x, grad, (lead, lead), preferred_element_type=jnp.float32).astype(dtype)

  dx = jnp.tensordot(grad, w.astype(x.dtype), (last, last))
  if not isinstance(w, Adapted):
    return dx, weight_gradient(x, grad, w.dtype)
  down = jnp.tensordot(x, w.a.astype(x.dtype), num_inputs)                     # [..., R]
  up = jnp.tensordot(grad, w.b.astype(x.dtype), (last, last))                  # [..., R]
  return dx, Adapted(None, w.scale * weight_gradient(x, up, w.a.dtype),
                     w.scale * weight_gradient(down, grad, w.b.dtype), w.scale)


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
