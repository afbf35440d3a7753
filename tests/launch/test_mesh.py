"""The mesh of a run, rows onto it and back, and the settings of several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from launch import mesh as mesh_lib
from nn.types import Batch

ROOT = str(Path(__file__).resolve().parents[2])


@pytest.mark.parametrize('sizes, shape', [
    ({'data': -1}, (8, 1, 1, 1)),
    ({'data': -1, 'fsdp': 1, 'expert': 1, 'model': 1}, (8, 1, 1, 1)),
    ({'data': 2, 'fsdp': -1, 'model': 2}, (2, 2, 1, 2)),
    ({'data': 2, 'expert': 2, 'model': 2}, (2, 1, 2, 2)),
    ({'data': 2}, (2, 1, 1, 1)),                       # fewer devices than there are
    ({'model': 3}, (1, 1, 1, 3)),
    ({}, (1, 1, 1, 1)),
])
def test_mesh_sizes(sizes, shape):
  mesh = mesh_lib.make_mesh(sizes)
  assert mesh.axis_names == ('data', 'fsdp', 'expert', 'model')
  assert mesh.devices.shape == shape
  assert mesh.axis_types == (AxisType.Auto,) * 4
  assert mesh_lib.batch_ways(mesh) == np.prod(shape[:3])


def test_a_mesh_of_given_devices():
  devices = jax.devices()[4:6]
  assert list(mesh_lib.make_mesh({'data': -1}, devices).devices.flat) == devices


@pytest.mark.parametrize('sizes, said', [
    ({'data': 4, 'model': 4}, 'data=4, model=4 needs 16 devices, there are 8'),
    ({'data': -1, 'model': 3}, '8 devices cannot be split by 3'),
    ({'data': -1, 'model': -1}, 'for one axis'),
    ({'data': 0}, 'data=0: wanted sizes of at least 1'),
    ({'data': -2}, 'data=-2'),
    ({'tensor': 2}, "'tensor'"),
    ({'data': -1, 'model': 16}, 'needs 16 devices'),
])
def test_meshes_that_do_not_fit_are_refused(sizes, said):
  with pytest.raises(ValueError, match=said):
    mesh_lib.make_mesh(sizes)


@pytest.mark.parametrize('owner, fits', [
    ([[0, 0], [1, 1]], True),
    ([[0], [0], [1], [1]], True),
    ([[0, 1], [0, 1]], False),
    ([[0, 0, 1, 1]], False),
])
def test_processes_that_would_hold_the_same_rows_are_refused(owner, fits):
  if fits:
    mesh_lib.check_owners(np.array(owner), 'model=2')
  else:
    with pytest.raises(ValueError, match='model=2.*same rows'):
      mesh_lib.check_owners(np.array(owner), 'model=2')


def batch(rows):
  tokens = np.arange(rows * 3, dtype=np.int32).reshape(rows, 3)
  return Batch(tokens=tokens, positions=tokens, segments=tokens, masks={'train': tokens > 4},
               weights={'policy': np.arange(rows, dtype=np.float32)},
               coef={'policy': np.float32(2)}, data={'top': (tokens[..., None], tokens)},
               temperature=np.float32(1), use=np.int32(0))


@pytest.mark.parametrize('put', [mesh_lib.put, mesh_lib.put_global])
@pytest.mark.parametrize('sizes, spec', [
    ({'data': -1}, PartitionSpec('data')),
    ({'data': 2, 'fsdp': 2, 'model': 2}, PartitionSpec(('data', 'fsdp'))),
    ({'model': 8}, PartitionSpec()),
])
def test_put_splits_rows_and_gather_undoes_it(put, sizes, spec):
  mesh = mesh_lib.make_mesh(sizes)
  there = put(batch(16), mesh)
  assert there.tokens.sharding.spec == there.weights['policy'].sharding.spec == spec
  assert there.data['top'][0].sharding.spec == spec
  assert there.tokens.addressable_shards[0].data.shape == (16 // mesh_lib.batch_ways(mesh), 3)
  assert there.coef['policy'].sharding.is_fully_replicated and there.coef['policy'].shape == ()
  assert there.advantage is None
  back = mesh_lib.gather(there)
  jax.tree.map(np.testing.assert_array_equal, back, batch(16))
  assert all(type(x) is np.ndarray for x in jax.tree.leaves(back))


def test_arrays_on_the_devices_are_only_laid_out_anew():
  mesh = mesh_lib.make_mesh({'data': -1})
  there = mesh_lib.put({'x': jax.numpy.arange(8)}, mesh)
  assert there['x'].sharding == mesh_lib.batch_sharding(mesh)
  np.testing.assert_array_equal(there['x'], np.arange(8))


@pytest.mark.parametrize('put', [mesh_lib.put, mesh_lib.put_global])
def test_rows_that_the_mesh_does_not_divide_are_refused(put):
  with pytest.raises(ValueError, match='12 rows cannot be split 8 ways.*data=4, fsdp=2'):
    put(batch(12), mesh_lib.make_mesh({'data': 4, 'fsdp': 2}))


def test_one_process_is_the_case_of_one():
  x = np.arange(6, dtype=np.int64).reshape(3, 2) + 2**40
  np.testing.assert_array_equal(mesh_lib.rows_of_all_processes(x), x)
  np.testing.assert_array_equal(mesh_lib.rows_of_this_process(x), x)
  assert float(mesh_lib.sum_over_processes({'a': 1 / 3})['a']) == 1 / 3


@pytest.mark.parametrize('arguments, environment, said', [
    (('host:1',), {}, '--num_processes or JAX_NUM_PROCESSES and --process_id or JAX_PROCESS_ID'),
    (('', 2, 0), {}, '--coordinator or JAX_COORDINATOR_ADDRESS'),
    ((), {'JAX_PROCESS_ID': '0'}, '--coordinator or JAX_COORDINATOR_ADDRESS and --num_processes'),
    (('host', 2, 0), {}, "'host' has no port"),
    (('host:1', 2, 2), {}, 'process_id is 2, but 2 processes have ids 0 to 1'),
    (('host:1',), {'JAX_NUM_PROCESSES': 'two'}, "JAX_NUM_PROCESSES is 'two'"),
])
def test_incomplete_settings_of_several_processes_are_refused(
    monkeypatch, arguments, environment, said):
  for name in ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=said):
    mesh_lib.init_distributed(*arguments)


def test_a_port_in_use_is_named(monkeypatch):
  def refuse(*args, **options):
    raise RuntimeError('Failed to start RPC server')
  monkeypatch.setattr(jax.distributed, 'initialize', refuse)
  with pytest.raises(ValueError, match='process 0 .* at host:1: Failed to start'):
    mesh_lib.init_distributed('host:1', 2, 0)


def test_without_settings_there_is_one_process():
  mesh_lib.init_distributed()
  assert jax.process_count() == 1


# Two processes of two devices each, so a global batch of 8 rows is two rows per device. The second
# mesh leaves the rows of a process on both of its devices.
CHILD = '''
import jax, numpy as np
from launch import mesh as mesh_lib
mesh_lib.init_distributed()
p = jax.process_index()
whole = np.arange(16, dtype=np.float32).reshape(8, 2)
mine = mesh_lib.rows_of_this_process(whole)
np.testing.assert_array_equal(mine, whole[4 * p:4 * p + 4])
np.testing.assert_array_equal(mesh_lib.rows_of_all_processes(mine), whole)
for sizes in ({'data': -1}, {'fsdp': 2, 'model': 2}):
  mesh = mesh_lib.make_mesh(sizes)
  for there in (mesh_lib.put({'x': mine, 'c': 3.0}, mesh),
                mesh_lib.put_global({'x': whole, 'c': 3.0}, mesh)):
    assert there['x'].shape == (8, 2)
    for shard in there['x'].addressable_shards:
      np.testing.assert_array_equal(shard.data, whole[shard.index])
    total = jax.jit(lambda t: (t['x'].sum(), t['x'] * t['c']))(there)
    assert float(total[0]) == whole.sum()
    np.testing.assert_array_equal(mesh_lib.gather(total[1]), 3 * whole)
big = np.array([2**40 + p], np.int64)
np.testing.assert_array_equal(mesh_lib.rows_of_all_processes(big), [2**40, 2**40 + 1])
sums = mesh_lib.sum_over_processes({'a': 2.0**-40 + p, 'b': np.array([p, 1])})
assert float(sums['a']) == 1 + 2.0**-39 and sums['b'].tolist() == [1, 2]
for sizes, said in (({'data': 1, 'model': 4}, 'same rows'), ({'data': 2}, 'unused')):
  try:
    mesh_lib.make_mesh(sizes)
  except ValueError as error:
    assert said in str(error), error
  else:
    raise AssertionError(sizes)
'''


def test_two_processes_share_rows_and_gather_them():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  common = os.environ | {
      'XLA_FLAGS': '--xla_force_host_platform_device_count=2', 'PYTHONPATH': ROOT,
      'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': '2'}
  children = [subprocess.Popen(
      [sys.executable, '-c', CHILD], env=common | {'JAX_PROCESS_ID': str(i)},
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in range(2)]
  try:
    said = [child.communicate(timeout=120)[0] for child in children]
  finally:
    for child in children:
      child.kill()
  assert [child.returncode for child in children] == [0, 0], '\n'.join(said)
