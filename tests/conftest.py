"""Every test runs on 8 simulated CPU devices, and XLA does not try hard.

Tests compile much and compute little. Set before jax is imported.
"""

import os
import sys
from pathlib import Path

os.environ['JAX_PLATFORMS'] = 'cpu'
# With fewer threads than devices, collectives deadlock on small machines.
os.environ['NPROC'] = '16'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8').strip()
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = 'true'
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope='module')
def programs_are_given_back():
  """Every program has memory maps of its own, of which the system grants a process 65,530."""
  yield
  jax.clear_caches()
