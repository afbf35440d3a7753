"""The TPU kernels: interpreted against the definition, and compiled for chips that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import fg2_gdn as op
from kernels.fg2_gdn import pallas_tpu, reference

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {'xla_backend_optimization_level': 0}
NAMES = (
  'o',
  'final_state',
  *(f'gradient of {name}' for name in ('q', 'k', 'v', 'g', 'gate_k', 'gate_v', 'state')),
)


def inputs(length, heads=(1, 2), sizes=(8, 12), scalar=False, rows=1):
  """Arguments, and segments with padding at both ends and inside, and two documents."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal((rows, *shape))
  (key_heads, value_heads), (key, value) = heads, sizes
  wide = 1 if scalar else key
  k = normal(length, key_heads, key)
  arrays = (
    normal(length, key_heads, key),
    k / np.linalg.norm(k, axis=-1, keepdims=True),
    normal(length, value_heads, value),
    -np.exp(normal(length, value_heads, wide)),
    1 / (1 + np.exp(-normal(length, value_heads, wide))),
    1 / (1 + np.exp(-normal(length, value_heads, 1 if scalar else value))),
    normal(value_heads, key, value),
  )
  segments = np.ones((rows, length), int)
  segments[:, :3] = segments[:, length // 3 : length // 3 + 2] = segments[:, -1:] = 0
  segments[:, length // 2 : -1] = 2
  return [jnp.asarray(x, jnp.float32) for x in arrays], segments


def both(scan, arrays, segments, **options):
  """Output, final state and the gradients of a random reading of them, by name."""
  rng = np.random.default_rng(1)
  marks = op._marks(jnp.asarray(segments))

  def loss(*arrays):
    result = scan(*arrays, *marks, scale=0.3, **options)
    return sum(
      jnp.sum(x * jnp.asarray(rng.standard_normal(x.shape), jnp.float32)) for x in result
    ), result

  step = jax.jit(jax.value_and_grad(loss, range(7), has_aux=True), compiler_options=OPTIONS)
  (_, result), gradients = step(*arrays)
  return dict(zip(NAMES, (*result, *gradients)))


def assert_close(actual, expected, tolerance):
  for name in expected:
    x, y = (np.asarray(z[name], np.float64) for z in (actual, expected))
    assert np.isfinite(x).all(), name
    assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), (
      name,
      np.abs(x - y).max() / np.abs(y).max(),
    )


@pytest.mark.parametrize(
  'symmetric, scalar, heads, together',
  [
    (True, False, (2, 4), 4),  # two key heads of two value heads each in one grid step
    (True, False, (2, 8), 2),  # two grid steps share each key head
    (False, True, (2, 2), 1),  # KDA's and GDN's beta, GDN's decay: one number per head
  ],
)
def test_kernels_equal_reference_in_values_and_every_gradient(symmetric, scalar, heads, together):
  arrays, segments = inputs(37, heads, scalar=scalar)
  expected = both(reference.scan, arrays, segments, symmetric=symmetric)
  actual = both(
    pallas_tpu.scan, arrays, segments, symmetric=symmetric, chunk=16, heads=together, interpret=True
  )
  assert_close(actual, expected, 1e-6)
  for name in ('q', 'k', 'v', 'g', 'gate_k', 'gate_v'):
    np.testing.assert_array_equal(actual[f'gradient of {name}'][segments == 0], 0)


def test_extreme_decay_and_equal_keys():
  arrays, segments = inputs(32)
  strong = np.random.default_rng(2).random(arrays[3].shape) < 0.5
  arrays[3] = jnp.where(strong, -50.0, arrays[3] * 1e-2)
  arrays[1] = jnp.broadcast_to(arrays[1][:, :1], arrays[1].shape)
  arrays[4] = jnp.full_like(arrays[4], 2**0.5)
  expected = both(reference.scan, arrays, segments, symmetric=True)
  actual = both(
    pallas_tpu.scan, arrays, segments, symmetric=True, chunk=32, heads=1, interpret=True
  )
  assert_close(actual, expected, 1e-5)


def test_bfloat16_inputs_lose_bfloat16_digits_only():
  arrays, segments = inputs(40, sizes=(32, 32))
  expected = both(reference.scan, arrays, segments, symmetric=True)
  halves = [x.astype(jnp.bfloat16) if i not in (3, 6) else x for i, x in enumerate(arrays)]
  actual = both(
    pallas_tpu.scan, halves, segments, symmetric=True, chunk=32, heads=2, interpret=True
  )
  assert (actual['o'].dtype, actual['final_state'].dtype) == (jnp.bfloat16, jnp.float32)
  assert (actual['gradient of k'].dtype, actual['gradient of g'].dtype) == (
    jnp.bfloat16,
    jnp.float32,
  )
  assert_close(actual, expected, 8 * 2**-8)


def test_scratch_starts_undefined():
  """TPU interpret mode fills scratch with NaN and refuses to read out of bounds."""
  arrays, segments = inputs(20, sizes=(8, 8))
  marks = op._marks(jnp.asarray(segments))
  mode = pltpu.InterpretParams(uninitialized_memory='nan', out_of_bounds_reads='raise')
  strict = jax.jit(
    lambda *x: pallas_tpu.scan(
      *x, *marks, symmetric=True, scale=0.3, chunk=16, heads=2, interpret=mode
    )
  )(*arrays)
  expected = reference.scan(*arrays, *marks, symmetric=True, scale=0.3)
  for x, y in zip(strict, expected):
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_the_inverse_has_sixteen_bits_where_operands_have_eight():
  x, y = (np.random.default_rng(i).standard_normal((64, 64)).astype(np.float32) for i in (0, 1))
  error = lambda product: np.abs(product - x @ y).max() / np.abs(x @ y).max()
  assert error(pallas_tpu._dot_3(x, y, False)) < 2e-5 < 1e-3 < error(pallas_tpu._dot(x, y, False))


def test_the_kernels_are_refused_where_they_cannot_run():
  (q, k, v, g, gate_k, gate_v, state), _ = inputs(5)
  with pytest.raises(ValueError, match="'pallas_tpu' runs on tpu, not on cpu"):
    op.fg2_gdn(q, k, v, g, gate_k, gate_v, implementation='pallas_tpu')


# What benchmarks/fg2_gdn_tpu.py says of the defaults, rounded up: bundles per token and head,
# spilling stores.
BOUNDS = {'forward': (25, 600), 'backward': (39, 2000)}


@pytest.mark.extras
@pytest.mark.parametrize('key_heads, value_heads', [(16, 16), (16, 32)])
def test_kernels_compile_for_every_chip_within_bounds(key_heads, value_heads):
  pytest.importorskip('libtpu', reason='needs the extra aot')
  command = [
    sys.executable,
    'benchmarks/fg2_gdn_tpu.py',
    '--json',
    '--chunks',
    str(op.CHUNK['tpu']),
    '--heads',
    str(op.HEADS),
    '--key-heads',
    str(key_heads),
    '--value-heads',
    str(value_heads),
  ]
  environment = {name: x for name, x in os.environ.items() if name != 'XLA_FLAGS'}
  out = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )
  cases = [json.loads(line) for line in out.stdout.splitlines() if line.startswith('{')]
  assert out.returncode == 0 and len(cases) == 6, out.stderr[-2000:]
  for case in cases:
    bundles, spills = BOUNDS[case['kernel']]
    assert case['bundles_per_token'] <= bundles and case['spills'] <= spills, case
