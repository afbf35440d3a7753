"""Runs compile much and compute little: they share what they compile, and XLA does not try hard."""

import os

import jax
import pytest


@pytest.fixture(scope='session')
def compiled(tmp_path_factory):
  """A folder of compiled programs, of all of pytest's processes."""
  folder = tmp_path_factory.getbasetemp()
  folder = folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder
  (folder / 'compiled').mkdir(exist_ok=True)
  return str(folder / 'compiled')


@pytest.fixture(scope='module')
def cheap_compilation(compiled):
  """For a module whose tests train; holds for the processes it starts, too."""
  settings = {'jax_compilation_cache_dir': compiled,
              'jax_persistent_cache_min_compile_time_secs': 0,
              'jax_persistent_cache_min_entry_size_bytes': -1,
              'jax_disable_most_optimizations': True}
  before = {name: jax.config.values[name] for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
    del os.environ[name.upper()]
