"""Attention kernels, forward and backward, compiled for machines not here: TPU v5e and H200."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import attention as kernel
from tests import machines


@pytest.mark.extras
@pytest.mark.parametrize('target, name', [('v5e', 'splash'), ('h200', 'gpu')])
@pytest.mark.parametrize('length, size, value_size, dtype', [
    (37, 32, 32, jnp.float32), (640, 64, 64, jnp.bfloat16), (1024, 128, 128, jnp.bfloat16),
    (128, 256, 256, jnp.float32), (640, 192, 128, jnp.bfloat16),
])
def test_kernels_compile(target, name, length, size, value_size, dtype):
  devices = np.array(machines.devices(target)[:4])
  mesh = Mesh(devices.reshape(-1, 2 if len(devices) > 1 else 1), ('data', 'model'),
              axis_types=(AxisType.Auto,) * 2)
  axes = kernel.Axes(batch=('data',), heads=('model',), kv_heads=('model',))

  def array(*shape, dtype=dtype, spec=('data', None, 'model')):
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec[:len(shape)])))

  def run(q, k, v, grad, segments):
    attend = lambda *args: kernel.attention(
        *args, segments=segments, implementation=name, axes=axes)
    out, back = jax.vjp(attend, q, k, v)
    return out, back(grad)

  q, k, v, grad = (array(4, length, heads, channels) for heads, channels in (
      (4, size), (2, size), (2, value_size), (4, value_size)))
  segments = array(4, length, dtype=jnp.int32, spec=('data', None))
  with jax.set_mesh(mesh):
    program = jax.jit(run).lower(q, k, v, grad, segments).compile().as_text()
  assert program.count('custom_call_target=') >= 2  # forward and backward
  assert 'all-gather' not in program                # every device has all its rows and heads need
