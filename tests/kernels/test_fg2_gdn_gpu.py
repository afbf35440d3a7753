"""The Hopper kernels: interpreted against the definition, and compiled for an absent H200."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import fg2_gdn as op
from kernels.fg2_gdn import pallas_gpu, reference
from tests.kernels import test_fg2_gdn_pallas as laws

try:
  from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # jax 0.10
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

ROOT = Path(__file__).resolve().parents[2]


def expected_and_actual(arrays, segments, symmetric, operand):
  """Output, final state and every gradient, by the definition and by the interpreted kernels."""
  return laws.both(reference.scan, arrays, segments, symmetric=symmetric), laws.both(
    pallas_gpu.scan,
    arrays,
    segments,
    symmetric=symmetric,
    operand=operand,
    interpret=InterpretGPUParams(),
  )


@pytest.mark.parametrize(
  'symmetric, scalar, heads, length',
  [
    (True, False, (1, 2), 70),  # two value heads share a key head; a state passes between chunks
    (False, True, (1, 1), 37),  # KDA's and GDN's beta, GDN's decay: one number per head
  ],
)
def test_kernels_equal_reference_in_values_and_every_gradient(symmetric, scalar, heads, length):
  arrays, segments = laws.inputs(length, heads, scalar=scalar)
  expected, actual = expected_and_actual(arrays, segments, symmetric, jnp.float32)
  laws.assert_close(actual, expected, 1e-6)
  for name in ('q', 'k', 'v', 'g', 'gate_k', 'gate_v'):
    np.testing.assert_array_equal(actual[f'gradient of {name}'][segments == 0], 0)


def test_extreme_decay_and_equal_keys_over_128_channels():
  """Two tiles of channels; where a document goes on, half the decays are exp(-50)."""
  arrays, segments = laws.inputs(64, (1, 1), (70, 66))
  strong = np.random.default_rng(2).random(arrays[3].shape) < 0.5
  arrays[3] = jnp.where(strong, -50.0, arrays[3] * 1e-2)
  arrays[1] = jnp.broadcast_to(arrays[1][:, :1], arrays[1].shape)
  arrays[4] = jnp.full_like(arrays[4], 2**0.5)
  expected, actual = expected_and_actual(arrays, segments, True, jnp.float32)
  laws.assert_close(actual, expected, 1e-5)


def test_bfloat16_operands_lose_bfloat16_digits_only():
  arrays, segments = laws.inputs(40, (1, 1), (32, 32))
  halves = [x.astype(jnp.bfloat16) if i not in (3, 6) else x for i, x in enumerate(arrays)]
  expected = laws.both(reference.scan, arrays, segments, symmetric=True)
  actual = laws.both(
    pallas_gpu.scan, halves, segments, symmetric=True, interpret=InterpretGPUParams()
  )
  assert (actual['o'].dtype, actual['final_state'].dtype) == (jnp.bfloat16, jnp.float32)
  assert (actual['gradient of k'].dtype, actual['gradient of g'].dtype) == (
    jnp.bfloat16,
    jnp.float32,
  )
  laws.assert_close(actual, expected, 8 * 2**-8)


def test_the_inverse_has_sixteen_bits_where_operands_have_eight(monkeypatch):
  """Run step by step, with arrays in the place of shared memory."""
  monkeypatch.setattr(pallas_gpu.plgpu, 'commit_smem', lambda: None)
  setup = pallas_gpu.Setup(True, 1.0, 1, 64, jnp.dtype(jnp.bfloat16), InterpretGPUParams())
  lower = np.tril(np.random.default_rng(0).standard_normal((64, 64)) / 4, -1).astype(np.float32)
  scratch = [np.zeros((64, 64), jnp.bfloat16) for _ in range(2)]
  t, s = (jnp.asarray(x) for x in np.indices((64, 64)))
  with jax.disable_jit():
    inverse = pallas_gpu._inverse(setup, jnp.asarray(lower), t, s, *scratch)
  expected = np.linalg.inv(np.eye(64) + lower)
  assert np.abs(inverse - expected).max() < 2**-14 * np.abs(expected).max()


def test_log_decays_enter_with_sixteen_bits():
  g = -jnp.exp(jnp.asarray(np.random.default_rng(0).standard_normal(256), jnp.float32))
  setup = pallas_gpu.Setup(True, 1.0, 1, 64, jnp.dtype(jnp.bfloat16), None)
  high, low = jax.jit(lambda g: pallas_gpu._parts_of_decays(setup, g))(g)
  expected = np.asarray(g, np.float64) * np.log2(np.e)
  both = np.asarray(high, np.float64) + np.asarray(low, np.float64)
  np.testing.assert_allclose(both, expected, rtol=2**-16)


def test_what_the_kernels_cannot_take_is_refused(monkeypatch):
  (q, k, v, g, gate_k, gate_v, _), _ = laws.inputs(5)
  run = lambda q, v, **options: op.fg2_gdn(
    q, q, v, g, gate_k, gate_v, implementation='pallas_gpu', **options
  )
  with pytest.raises(ValueError, match="'pallas_gpu' runs on gpu, not on cpu"):
    run(q, v)
  monkeypatch.setattr(op, 'platform', lambda: 'gpu')
  with pytest.raises(ValueError, match='dtype float32; pallas_gpu takes bfloat16'):
    run(q, v)
  q, v = q.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
  with pytest.raises(ValueError, match='chunk_size is 32; pallas_gpu has chunks of 64'):
    run(q, v, chunk_size=32)
  v, gate_v = (jnp.repeat(x, 11, axis=-1) for x in (v, gate_v))
  with pytest.raises(ValueError, match='v 132; pallas_gpu takes at most 128'):
    run(q, v)


# What benchmarks/fg2_gdn_gpu.py says, rounded up: bytes of spilling stores per thread.
SPILLS = {'chunk_kernel': 300, 'state_kernel': 0, 'reverse_kernel': 0, 'gradient_kernel': 1000}


@pytest.mark.extras
def test_kernels_compile_for_h200_within_bounds():
  pytest.importorskip('jax_plugins.xla_cuda12', reason='needs the extra aot')
  environment = {name: x for name, x in os.environ.items() if name != 'XLA_FLAGS'}
  out = subprocess.run(
    [sys.executable, 'benchmarks/fg2_gdn_gpu.py', 'compile', '--json'],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  cases = [json.loads(line) for line in out.stdout.splitlines() if line.startswith('{')]
  assert {case['kernel'] for case in cases} == set(SPILLS), out.stderr[-2000:]
  for case in cases:
    assert case['shared_bytes'] <= 232448, case
    assert case['spills'] is None or case['spills'] <= SPILLS[case['kernel']], case


def test_measuring_without_a_gpu_is_refused_in_one_line():
  out = subprocess.run(
    [sys.executable, 'benchmarks/fg2_gdn_gpu.py', 'measure'],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert (out.returncode, out.stderr) == (1, 'measure needs a GPU, and jax has cpu alone\n')
