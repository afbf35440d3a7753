"""Runs of a session share what they compile."""

import os

import jax
import pytest


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  """Equal programs are compiled once for all runs of a session, those of other processes too."""
  settings = {'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('compiled')),
              'jax_persistent_cache_min_compile_time_secs': 0,
              'jax_persistent_cache_min_entry_size_bytes': -1}
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
    del os.environ[name.upper()]
