"""Every test runs on 8 simulated CPU devices, and XLA does not try hard.

Tests compile much and compute little: what one process of pytest compiled, or one that a test
started, no other compiles again. Set before jax is imported.
"""

import gc
import os
import sys
import tempfile
from pathlib import Path

os.environ['JAX_PLATFORMS'] = 'cpu'
# With fewer threads than devices, collectives deadlock on small machines.
os.environ['NPROC'] = '16'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8').strip()
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = 'true'
if 'PYTEST_XDIST_WORKER' not in os.environ:
  compiled = tempfile.TemporaryDirectory(prefix='compiled-')      # gone when this process ends
  os.environ['JAX_COMPILATION_CACHE_DIR'] = compiled.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import pytest  # noqa: E402

# Tracing makes many small objects that stay: looking for cycles among them finds few.
gc.set_threshold(50_000, 20, 50)
MAPS = Path('/proc/self/maps')


@pytest.fixture(autouse=True, scope='module')
def programs_are_given_back():
  """Every program has memory maps of its own, of which the system grants a process 65,530."""
  yield
  if not MAPS.exists() or MAPS.read_bytes().count(b'\n') > 10_000:
    jax.clear_caches()
