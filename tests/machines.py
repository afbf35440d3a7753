"""Machines that are not here, to compile for; a test of one is skipped without the extra `aot`."""

import pytest

from launch import aot


def devices(target: str) -> list:
  """The devices of launch.aot.devices."""
  needed = 'jax_plugins.xla_cuda12' if target == 'h200' else 'libtpu'
  pytest.importorskip(needed, reason='needs the extra aot')
  return aot.devices('v5e:2x2' if target == 'v5e' else target)
