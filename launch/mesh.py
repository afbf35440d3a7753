"""Devices: the mesh, rows onto it and back, and runs of several processes.

P processes, n rows of one process, N = n P rows of the batch.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nn.config import RULES

AXES = ('data', 'fsdp', 'expert', 'model')
BATCH = dict(RULES)['batch']           # mesh axes that rows are split over


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of a run.

  Args:
    sizes: {axis: devices along it}; at most one is -1, the rest. Axes not named have size 1.
    devices: default all. A mesh of fewer takes the first ones, if there is only one process.

  Raises:
    ValueError: the mesh does not fit the devices, or would give the same rows to two processes.
  """
  devices = jax.devices() if devices is None else list(devices)
  named = ', '.join(f'{axis}={size}' for axis, size in sizes.items())
  if strange := set(sizes) - set(AXES):
    raise ValueError(f'mesh axes {sorted(strange)} are unknown; there are {AXES}')
  rest = [axis for axis, size in sizes.items() if size == -1]
  if len(rest) > 1 or [size for size in sizes.values() if size < 1 and size != -1]:
    raise ValueError(f'mesh {named}: wanted sizes of at least 1, or -1 (the rest) for one axis')
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if fixed > len(devices):
    raise ValueError(f'mesh {named} needs {fixed} devices, there are {len(devices)}')
  if rest and len(devices) % fixed:
    raise ValueError(f'mesh {named}: {len(devices)} devices cannot be split by {fixed}')
  shape = [sizes.get(axis, 1) for axis in AXES]
  shape = [len(devices) // fixed if size == -1 else size for size in shape]
  processes = len({d.process_index for d in devices})
  if processes > 1 and math.prod(shape) < len(devices):
    raise ValueError(f'mesh {named} leaves some of the {len(devices)} devices unused, '
                     f'but all {processes} processes must take part')
  # Auto: with explicit axes, the default of make_mesh, an embedding gather does not trace.
  mesh = jax.make_mesh(tuple(shape), AXES, (AxisType.Auto,) * len(AXES), devices=devices)
  owner = np.vectorize(lambda d: d.process_index, otypes=[int])(mesh.devices)
  check_owners(owner.reshape(-1, shape[AXES.index('model')]), named)
  return mesh


def check_owners(owner: np.ndarray, named: str) -> None:
  """Every process must hold rows of its own, since each of them reads its own.

  Args:
    owner: [row shards, devices with the same rows] int, the process of every device.
    named: the mesh, for the message.
  """
  if (owner != owner[:, :1]).any():
    raise ValueError(f'mesh {named}: the axis model would spread over processes, which would hold '
                     'the same rows; give it at most as many devices as one process has')


def batch_ways(mesh: Mesh) -> int:
  """The number of parts that rows are split into."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows, the first axis of an array, split over all batch axes; the other axes whole."""
  axes = tuple(axis for axis in BATCH if mesh.shape[axis] > 1)
  if not axes:
    return NamedSharding(mesh, PartitionSpec())
  return NamedSharding(mesh, PartitionSpec(axes if len(axes) > 1 else axes[0]))


def put(tree: Any, mesh: Mesh) -> Any:
  """Rows of this process -> global arrays, split by rows.

  Args:
    tree: of numpy arrays [n, ...], the same n in every process; numbers and arrays [], the same
      in every process, are replicated. jax arrays are taken as global and only laid out anew.

  Returns:
    The tree of jax arrays [N, ...], with the rows of every process on its own devices.
  """
  def one(x):
    if isinstance(x, jax.Array):
      return jax.device_put(x, sharding_of(x.shape, mesh))
    x = np.asarray(x)
    shape = (x.shape[0] * jax.process_count(), *x.shape[1:]) if x.ndim else ()
    return jax.make_array_from_process_local_data(sharding_of(shape, mesh), x, shape)
  return jax.tree.map(one, tree)


def put_global(tree: Any, mesh: Mesh) -> Any:
  """Arrays that every process has whole -> global arrays, split by rows.

  Args:
    tree: of numpy arrays [N, ...], the same in every process; [] are replicated.
  """
  def one(x):
    if isinstance(x, jax.Array):
      return jax.device_put(x, sharding_of(x.shape, mesh))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding_of(x.shape, mesh), lambda index: x[index])
  return jax.tree.map(one, tree)


def sharding_of(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
  """The batch sharding of an array with these rows; replicated if it has none."""
  if not shape:
    return NamedSharding(mesh, PartitionSpec())
  if shape[0] % (ways := batch_ways(mesh)):
    raise ValueError(f'{shape[0]} rows cannot be split {ways} ways, over mesh axes '
                     f'{", ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH)}')
  return batch_sharding(mesh)


def gather(tree: Any) -> Any:
  """The inverse of put: global jax arrays [N, ...] -> the same as numpy, whole on every process."""
  def one(x):
    whole = x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x) if whole else multihost_utils.process_allgather(x, tiled=True)
  return jax.tree.map(one, tree)


def rows_of_all_processes(tree: Any) -> Any:
  """Numpy arrays [n, ...], the same n in every process -> [N, ...], the rows of process 0 first."""
  def one(x):
    x = np.ascontiguousarray(x)
    # As bytes: jax would narrow 64-bit numbers.
    rows = multihost_utils.process_allgather(x.reshape(len(x), -1).view(np.uint8), tiled=True)
    return rows.view(x.dtype).reshape(-1, *x.shape[1:])
  return jax.tree.map(one, tree)


def rows_of_this_process(tree: Any) -> Any:
  """Numpy arrays [N, ...] -> [n, ...]; undoes rows_of_all_processes."""
  def one(x):
    n = len(x) // jax.process_count()
    return x[jax.process_index() * n:(jax.process_index() + 1) * n]
  return jax.tree.map(one, tree)


def sum_over_processes(tree: Any) -> Any:
  """Numbers and numpy arrays of one shape in every process -> their float64 sums, everywhere."""
  return jax.tree.map(
      lambda x: rows_of_all_processes(np.asarray(x, np.float64)[None]).sum(axis=0), tree)


def init_distributed(coordinator: str = '', num_processes: int = 0, process_id: int = -1) -> None:
  """Joins the processes of a run. Without any setting it has one process, and this does nothing.

  Args:
    coordinator: host:port of process 0; '': JAX_COORDINATOR_ADDRESS. auto: the cluster (a TPU pod,
      Slurm, ...) says all three.
    num_processes: 0: JAX_NUM_PROCESSES.
    process_id: of this one, from 0; -1: JAX_PROCESS_ID.
  """
  coordinator = coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS', '')
  if coordinator == 'auto':
    jax.distributed.initialize()
    return
  num_processes = num_processes or from_environment('JAX_NUM_PROCESSES', 0)
  process_id = process_id if process_id >= 0 else from_environment('JAX_PROCESS_ID', -1)
  if not coordinator and not num_processes and process_id < 0:
    return
  settings = {'--coordinator or JAX_COORDINATOR_ADDRESS': coordinator,
              '--num_processes or JAX_NUM_PROCESSES': num_processes,
              '--process_id or JAX_PROCESS_ID': process_id >= 0}
  if missing := [name for name, given in settings.items() if not given]:
    raise ValueError(f'a run of several processes also needs {" and ".join(missing)}')
  if not coordinator.rpartition(':')[2].isdigit():
    raise ValueError(f'coordinator {coordinator!r} has no port; wanted host:port')
  if process_id >= num_processes:
    raise ValueError(f'process_id is {process_id}, '
                     f'but {num_processes} processes have ids 0 to {num_processes - 1}')
  try:
    jax.distributed.initialize(
        coordinator, num_processes, process_id, cluster_detection_method='deactivate')
  except RuntimeError as error:
    raise ValueError(
        f'process {process_id} cannot take part in the run at {coordinator}: {error}') from error


def from_environment(name: str, default: int) -> int:
  text = os.environ.get(name, '')
  if text and not text.isdigit():
    raise ValueError(f'{name} is {text!r}, wanted a whole number')
  return int(text) if text else default
