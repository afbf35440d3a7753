"""What test_checkpoint.py starts: a process that dies while saving, or one of two that save."""

import os
import signal
import sys
from pathlib import Path

MODE, WORKDIR = sys.argv[1:3]
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['NPROC'] = '16'                # see tests/conftest.py
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

from launch.checkpoint import Checkpointer  # noqa: E402

TABLE = np.arange(64, dtype=np.float32).reshape(8, 8)


def killed() -> None:
  """Saves step 1, then dies by SIGKILL as soon as step 2 is being written in the background."""
  big = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32)
  checkpoints = Checkpointer(WORKDIR)
  checkpoints.save(1, {'params': {'w': big}}, {'cursor': 1}, {}, wait=True)
  checkpoints.save(2, {'params': {'w': big + 1}}, {'cursor': 2}, {})
  os.kill(os.getpid(), signal.SIGKILL)


def together(process: int, port: int) -> None:
  """Saves its part of a table and of the memory, and reads the table split another way."""
  jax.distributed.initialize(f'127.0.0.1:{port}', 2, process)
  mesh = jax.make_mesh((2, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
  place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  table = jax.make_array_from_callback(TABLE.shape, place('data', 'model'), lambda i: TABLE[i])
  key = jax.jit(lambda: jax.random.key(3), out_shardings=place())()
  state = {'params': {'w': table}, 'key': key}
  memory = {'reader': {str(process): {'next': 10 + process}}, 'method': {'seen': np.arange(3)}}
  other = jax.ShapeDtypeStruct(TABLE.shape, TABLE.dtype, sharding=place('model', 'data'))
  abstract = {'params': {'w': other}, 'key': jax.ShapeDtypeStruct((), key.dtype, sharding=place())}
  with Checkpointer(WORKDIR, keep=1) as checkpoints:
    checkpoints.save(1, state, memory, {'config': {'x': 1}})
    checkpoints.save(2, state, memory, {'config': {'x': 1}}, wait=True)
    assert checkpoints.steps() == [2]
    assert checkpoints.meta(2)['processes'] == 2
    found = checkpoints.memory(2)
    assert found['reader'] == {'0': {'next': 10}, '1': {'next': 11}}, found
    assert found['method']['seen'].tolist() == [0, 1, 2]
    restored = checkpoints.restore(2, abstract)
  w = restored['params']['w']
  assert w.sharding == place('model', 'data')
  for shard in w.addressable_shards:
    np.testing.assert_array_equal(shard.data, TABLE[shard.index])
  np.testing.assert_array_equal(*(jax.random.key_data(k) for k in (restored['key'], key)))
  print(f'process {process} is done', flush=True)


if __name__ == '__main__':
  killed() if MODE == 'killed' else together(int(sys.argv[3]), int(sys.argv[4]))
