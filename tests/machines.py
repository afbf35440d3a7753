"""Machines that are not here, to compile for.

The compilers come as packages (the extra `aot`); nothing can be executed.
"""

import functools
import os

import pytest

os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')          # never ask a metadata server
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # else a second process fails on a lock
for name, value in {
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8', 'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0'}.items():
  os.environ.setdefault(name, value)                      # only silences warnings

from jax.experimental import topologies  # noqa: E402

H200 = """gpu_device_info {
 threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 \
shared_memory_per_core: 233472
 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 \
block_dim_limit_y: 65535
 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 \
clock_rate_ghz: 1.98
 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448 \
cuda_compute_capability { major: 9 }
 registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H200"
"""


@functools.cache
def devices(target: str) -> list:
  """The devices of a machine to compile for: four chips of a v5e, or one H200."""
  if target == 'v5e':
    pytest.importorskip('libtpu', reason='needs the extra aot')
    return topologies.get_topology_desc('v5e:2x2', platform='tpu').devices
  pytest.importorskip('jax_plugins.xla_cuda12', reason='needs the extra aot')
  return topologies.get_topology_desc(platform='cuda', topology='1x1x1', target_config=H200).devices
