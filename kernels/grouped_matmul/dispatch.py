"""Which implementation runs, and the derivatives that all of them share.

N rows, E groups, I inputs, O outputs. An implementation is a module with `product` and
`weight_gradient`, see `reference`. The gradient of the rows is a product, too, with the matrices
turned round; so two functions are all there is to write for a platform.
"""

import functools

import jax

from kernels.attention import platform
from kernels.grouped_matmul import blocks, megablox, reference, tiles

IMPLEMENTATIONS = {'reference': reference, 'blocks': blocks, 'tiles': tiles, 'megablox': megablox}
KERNEL_PLATFORM = {'megablox': 'tpu'}          # the others run everywhere
AUTO = {'cpu': 'blocks', 'gpu': 'tiles', 'tpu': 'megablox'}


def choose(on: str) -> str:
  """The implementation that 'auto' stands for on platform `on`."""
  if on not in AUTO:
    raise ValueError(f'no grouped matmul for platform {on!r}; known are {sorted(AUTO)}')
  return AUTO[on]


def grouped_matmul(
    x: jax.Array, w: jax.Array, sizes: jax.Array, *, implementation: str = 'auto',
) -> jax.Array:
  """Row n times the matrix of its group.

  The first sizes[0] rows are of group 0, the next sizes[1] of group 1, ... No row is ever dropped,
  however uneven the groups. Rows behind the last group give zeros and get no gradient, whatever is
  in them, and an empty group's gradient is exactly zero.

  Args:
    x: [N, I] in the compute dtype.
    w: [E, I, O] float32, rounded to the compute dtype for the products.
    sizes: [E] int32, together at most N.
    implementation: a name of IMPLEMENTATIONS, or 'auto', see `choose`.

  Returns:
    [N, O] in x's dtype. The gradient of w is summed and kept in float32.

  Raises:
    ValueError: shapes that do not fit; an implementation unknown, or not of this platform.
  """
  if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or sizes.shape != w.shape[:1]:
    raise ValueError(f'x {x.shape}, w {w.shape}, sizes {sizes.shape} do not fit together; '
                     'wanted [N, I], [E, I, O], [E]')
  if implementation == 'auto':
    implementation = choose(platform())
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'unknown grouped matmul {implementation!r}; known are auto, '
                     f'{", ".join(IMPLEMENTATIONS)}')
  home = KERNEL_PLATFORM.get(implementation, platform())
  if platform() != home:
    raise ValueError(f'grouped matmul {implementation!r} runs on {home}, not on {platform()}')
  return with_derivatives(IMPLEMENTATIONS[implementation], x, w, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_derivatives(module, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """module.product, and its gradients by module.product and module.weight_gradient."""
  return _forward(module, x, w, sizes)[0]


def _forward(module, x, w, sizes):
  return module.product(x, w.astype(x.dtype), sizes), (x, w, sizes)


def _backward(module, residuals, grad):
  x, w, sizes = residuals
  dx = module.product(grad, w.astype(x.dtype), sizes, transposed=True)
  return dx, module.weight_gradient(x, grad, sizes).astype(w.dtype), None


with_derivatives.defvjp(_forward, _backward)
