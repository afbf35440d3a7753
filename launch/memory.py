"""Memory of methods and readers <-> one JSON document plus named arrays of bytes.

Saving, loading and saving again gives the same bytes. Trees are nested dicts, lists and tuples of
numpy arrays and scalars, Python numbers, strings, bools and None. In the document an array is a
reference, {'$array': {'name': .., 'dtype': .., 'shape': ..}}; other objects with a '$' key are what
JSON has no word for.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

Tree = Any


def encode(tree: Tree) -> tuple[Any, dict[str, np.ndarray]]:
  """The document, of what JSON can hold, and {name: [bytes] uint8}; both share nothing with tree.

  Arrays without elements have no bytes and no entry.

  Raises:
    ValueError: names the place of a value of another type.
  """
  arrays, numbers = {}, itertools.count()

  def reference(x: np.ndarray, path: str) -> dict:
    dtype, name = _dtype_name(x.dtype, path), str(next(numbers))
    if x.nbytes:
      arrays[name] = np.frombuffer(x.tobytes(), np.uint8)
    return {'name': name, 'dtype': dtype, 'shape': list(x.shape)}

  def visit(x: Tree, path: str) -> Any:
    if isinstance(x, np.generic):                # before float: np.float64 is one
      return {'$scalar': reference(np.asarray(x), path)}
    if isinstance(x, np.ndarray):
      return {'$array': reference(x, path)}
    if x is None or isinstance(x, (bool, int, str)):
      return x
    if isinstance(x, float):
      return x if math.isfinite(x) else {'$float': repr(x)}
    if isinstance(x, Mapping):
      if all(isinstance(k, str) and not k.startswith('$') for k in x):
        return {k: visit(v, f'{path}/{k}') for k, v in x.items()}
      items = [[visit(k, f'{path}, a key'), visit(v, f'{path}/{k}')] for k, v in x.items()]
      return {'$items': items}
    if isinstance(x, tuple):
      return {'$tuple': [visit(v, f'{path}/{i}') for i, v in enumerate(x)]}
    if isinstance(x, list):
      return [visit(v, f'{path}/{i}') for i, v in enumerate(x)]
    raise ValueError(f'memory{path} is a {type(x).__name__}; memory holds numpy arrays, numbers, '
                     'strings, bools and None in dicts, lists and tuples')

  return visit(tree, ''), arrays


def decode(document: Any, arrays: Mapping[str, np.ndarray]) -> Tree:
  """The tree that was encoded; its arrays are fresh and writable."""
  def array(ref: Mapping) -> np.ndarray:
    dtype, shape = np.dtype(ref['dtype']), tuple(ref['shape'])
    if not _num_bytes(ref):
      return np.zeros(shape, dtype)
    return np.frombuffer(np.asarray(arrays[ref['name']]).tobytes(), dtype).reshape(shape).copy()

  def visit(x: Any) -> Tree:
    if isinstance(x, list):
      return [visit(v) for v in x]
    if not isinstance(x, Mapping):
      return x
    match x:
      case {'$array': ref}:
        return array(ref)
      case {'$scalar': ref}:
        return array(ref)[()]
      case {'$float': text}:
        return float(text)
      case {'$tuple': items}:
        return tuple(visit(v) for v in items)
      case {'$items': items}:
        return {visit(k): visit(v) for k, v in items}
    return {k: visit(v) for k, v in x.items()}

  return visit(document)


def sizes(document: Any) -> dict[str, int]:
  """{name: number of bytes} of every array that belongs to the document."""
  if isinstance(document, Mapping):
    for kind in ('$array', '$scalar'):
      if kind in document:
        ref = document[kind]
        return {ref['name']: _num_bytes(ref)} if _num_bytes(ref) else {}
    document = list(document.values())
  if not isinstance(document, list):
    return {}
  return {name: size for x in document for name, size in sizes(x).items()}


def merge(parts: Sequence[Tree], path: str = '') -> Tree:
  """One tree of what several processes hold: dicts are united, all else must be the same in all.

  Raises:
    ValueError: names a place where two parts differ.
  """
  if len(parts) == 1:
    return parts[0]
  if all(isinstance(p, Mapping) for p in parts):
    keys = dict.fromkeys(k for p in parts for k in p)
    return {k: merge([p[k] for p in parts if k in p], f'{path}/{k}') for k in keys}
  for other in parts[1:]:
    if not _same(parts[0], other):
      raise ValueError(f'memory{path} differs between processes: {parts[0]!r} and {other!r}')
  return parts[0]


def gather(tree: Tree) -> Tree:
  """`merge` of what all processes hold, on all of them; they call it together."""
  if jax.process_count() == 1:
    return tree
  document, arrays = encode(tree)
  text = json.dumps([document, {name: x.tobytes().hex() for name, x in arrays.items()}])
  payload = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array([payload.size], np.int32))[:, 0]
  padded = np.zeros(lengths.max(), np.uint8)
  padded[:payload.size] = payload
  parts = []
  for row, length in zip(multihost_utils.process_allgather(padded), lengths):
    document, arrays = json.loads(row[:length].tobytes())
    raw = {name: np.frombuffer(bytes.fromhex(x), np.uint8) for name, x in arrays.items()}
    parts.append(decode(document, raw))
  return merge(parts)


def _num_bytes(ref: Mapping) -> int:
  return math.prod(ref['shape']) * np.dtype(ref['dtype']).itemsize


def _same(a: Tree, b: Tree) -> bool:
  (document, arrays), (other, others) = encode(a), encode(b)
  return document == other and all(np.array_equal(x, others[k]) for k, x in arrays.items())


def _dtype_name(dtype: np.dtype, path: str) -> str:
  """A text for np.dtype: '<f4', or 'bfloat16', whose short form would be that of raw bytes."""
  if dtype.hasobject or dtype.names:
    raise ValueError(f'memory{path} is an array of {dtype}, which cannot be saved')
  return dtype.str if np.dtype(dtype.str) == dtype else dtype.name
