"""Parameters are declared once, as a table of specs; everything else is derived from it.

A table is a nested dict with a Spec at every leaf; parameters are the same dict with arrays.
"""

import collections
import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = Any


@dataclasses.dataclass(frozen=True)
class Spec:
  """One array. Not a pytree, so `jax.tree.map(f, specs)` stops at it.

  contract: names of the axes a matmul with this array sums over; the others (without layers and
    expert) are its outputs. Empty: not a matrix (gains, biases, embedding tables). Fan-in, FLOPs,
    weight decay and Muon read it.
  """
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  init: Callable[[jax.Array, tuple[int, ...]], jax.Array]
  contract: tuple[str, ...] = ()
  trainable: bool = True

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise ValueError(f'shape {self.shape} and axes {self.axes} differ in length')
    if unknown := set(self.contract) - set(self.axes):
      raise ValueError(f'contract names {sorted(unknown)}, axes are {self.axes}')


def normal(stddev: float) -> Callable:
  """Initialiser: independent normal values with the given standard deviation."""
  return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  del key
  return jnp.ones(shape, jnp.float32)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  del key
  return jnp.zeros(shape, jnp.float32)


def matrix(
    sizes: Mapping[str, int], axes: tuple[str, ...], contract: tuple[str, ...],
    scale: float = 1.0,
) -> Spec:
  """A Spec whose entries have standard deviation scale / sqrt(fan-in). sizes: {axis name: size}."""
  fan_in = math.prod(sizes[a] for a in contract)
  return Spec(tuple(sizes[a] for a in axes), axes, normal(scale / math.sqrt(fan_in)), contract)


def stack(specs: Tree, n: int) -> Tree:
  """The table of n equal layers: every array gets a leading "layers" axis of size n."""
  def one(s: Spec) -> Spec:
    def init(key, shape):              # by vmap: a program of one layer's size, whatever n
      keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(shape[0]))
      return jax.vmap(lambda k: s.init(k, shape[1:]))(keys)
    return dataclasses.replace(s, shape=(n, *s.shape), axes=('layers', *s.axes), init=init)
  return jax.tree.map(one, specs)


def flat(tree: Tree) -> dict[str, Any]:
  """{'a/b/c': leaf}, in the order of the tree."""
  return traverse_util.flatten_dict(tree, sep='/')


def unflat(leaves: Mapping[str, Any]) -> Tree:
  return traverse_util.unflatten_dict(dict(leaves), sep='/')


def init(key: jax.Array, specs: Tree) -> Tree:
  """Float32 parameters.

  Each array's key is fold_in(key, crc32(name)): adding one leaves the others bit-identical.
  """
  return unflat({name: s.init(jax.random.fold_in(key, zlib.crc32(name.encode())), s.shape)
                 for name, s in flat(specs).items()})


def abstract(specs: Tree, shardings: Tree | None = None) -> Tree:
  """Float32 ShapeDtypeStructs, with shardings if given: for restore and ahead-of-time compiling."""
  if shardings is None:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs)
  return jax.tree.map(
      lambda s, h: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=h), specs, shardings)


def partition_spec(
    spec: Spec, mesh: Mesh, rules: Mapping[str, tuple[str, ...]], name: str = '',
) -> PartitionSpec:
  """Where the axes of one array go.

  Args:
    rules: {logical axis: mesh axes}. Mesh axes of size 1 or absent from the mesh are left out.

  Raises:
    KeyError: a logical axis without a rule.
    ValueError: a mesh axis used twice, or a size that its mesh axes do not divide.
  """
  used, parts = [], []
  for axis, size in zip(spec.axes, spec.shape):
    if axis not in rules:
      raise KeyError(f'{name}: no sharding rule for axis {axis!r}; rules exist for {sorted(rules)}')
    names = tuple(m for m in rules[axis] if mesh.shape.get(m, 1) > 1)
    ways = math.prod(mesh.shape[m] for m in names)
    if size % ways:
      raise ValueError(
          f'{name}: axis {axis!r} of size {size} cannot be split {ways} ways over mesh axes '
          f'{names}')
    used += names
    parts.append(names if len(names) > 1 else names[0] if names else None)
  if twice := [m for m, n in collections.Counter(used).items() if n > 1]:
    raise ValueError(f'{name}: mesh axes {twice} used twice for axes {spec.axes}')
  return PartitionSpec(*parts)


def shardings(specs: Tree, mesh: Mesh, rules: Mapping[str, tuple[str, ...]]) -> Tree:
  """The tree of NamedShardings; strict, see partition_spec."""
  return unflat({name: NamedSharding(mesh, partition_spec(s, mesh, rules, name))
                 for name, s in flat(specs).items()})


Rules = tuple[tuple[str, tuple[str, ...]], ...]


def mesh_axes(rules: Rules, axis: str, size: int) -> tuple[str, ...]:
  """Axes of the ambient mesh (jax.set_mesh) over which an activation's axis of this size is split.

  None where they do not divide it (the one row of a prompt): unlike a parameter's, its size is not
  known before the run.
  """
  shape = jax.sharding.get_abstract_mesh().shape
  names = tuple(m for m in dict(rules)[axis] if shape.get(m, 1) > 1)
  return names if size % math.prod(shape[m] for m in names) == 0 else ()


def ways(rules: Rules, axis: str, size: int) -> int:
  """How many pieces an activation's axis of this size is split into under the ambient mesh."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[m] for m in mesh_axes(rules, axis, size))


def constrain(x: jax.Array, rules: Rules, *axes: str | None) -> jax.Array:
  """Asks for a sharding of an activation under the ambient mesh; nothing happens without one.

  Args:
    axes: one logical axis per dimension of x; None: not split.
  """
  if jax.sharding.get_abstract_mesh().size <= 1:
    return x
  parts = [mesh_axes(rules, axis, size) or None if axis else None
           for axis, size in zip(axes, x.shape, strict=True)]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))


def split(tree: Tree, specs: Tree) -> tuple[Tree, Tree]:
  """(trainable, frozen) parts of a tree shaped like specs; `merge` puts them together again."""
  table, leaves = flat(specs), flat(tree)
  pick = lambda trainable: unflat(
      {k: v for k, v in leaves.items() if table[k].trainable == trainable})
  return pick(True), pick(False)


def merge(trainable: Tree, frozen: Tree) -> Tree:
  return unflat(flat(trainable) | flat(frozen)) if frozen else trainable


def count(specs: Tree) -> int:
  """Number of scalars."""
  return sum(math.prod(s.shape) for s in flat(specs).values())


def matmul_flops(specs: Tree) -> int:
  """Floating point operations of one vector's product with every matrix of the table."""
  return 2 * sum(math.prod(s.shape) for s in flat(specs).values() if s.contract)


def bytes_per_device(
    specs: Tree, mesh: Mesh, rules: Mapping[str, tuple[str, ...]], itemsize: int = 4,
) -> int:
  """Bytes one device holds of the table's arrays."""
  total = 0
  for name, s in flat(specs).items():
    ways = math.prod(
        mesh.shape[m] for part in partition_spec(s, mesh, rules, name) if part is not None
        for m in ((part,) if isinstance(part, str) else part))
    total += math.prod(s.shape) * itemsize // ways
  return total


def overview(specs: Tree) -> str:
  """A table for people: groups (first two parts of names), arrays, scalars, share of scalars."""
  groups = collections.defaultdict(list)
  for name, s in flat(specs).items():
    groups['/'.join(name.split('/')[:2])].append(math.prod(s.shape))
  total = count(specs)
  rows = [('parameters', 'arrays', 'scalars', 'share')]
  rows += [(name, f'{len(sizes)}', f'{sum(sizes):,}', f'{sum(sizes) / total:.1%}')
           for name, sizes in groups.items()]
  rows += [('total', f'{len(flat(specs))}', f'{total:,}', '100.0%')]
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  return '\n'.join(
      f'{row[0]:<{widths[0]}}' + ''.join(f'  {cell:>{w}}' for cell, w in zip(row[1:], widths[1:]))
      for row in rows)
