"""Hugging Face folders: config.json, safetensors and what lies beside them, in and out.

Tensors are mapped into memory one at a time, so that a device's block of a parameter touches only
the bytes it is made of. A folder is written under another name and renamed when it is whole.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nn import hf, param
from nn.config import ModelConfig

DTYPES = {'F32': np.dtype(np.float32), 'BF16': np.dtype(jnp.bfloat16),
          'F16': np.dtype(np.float16)}
LONGEST_HEADER = 100_000_000           # bytes; the format's own limit
SHARD_BYTES = 5_000_000_000            # of a file
INDEX = 'model.safetensors.index.json'
PICKLES = ('pytorch_model*.bin', '*.pt', '*.pth', '*.pkl', '*.ckpt')
TOKENIZER = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'vocab.json',
             'merges.txt', 'added_tokens.json', 'chat_template.jinja', 'chat_template.json',
             '*.model')


class Stored(NamedTuple):
  """Where a tensor is."""
  file: Path
  offset: int
  shape: tuple[int, ...]
  kind: str                            # a key of DTYPES, for what can be read


@dataclasses.dataclass(frozen=True)
class Origin:
  """What an export repeats of the folder that a model came from.

  config, generation: contents of config.json and generation_config.json.
  kind: the tensors' dtype, a key of DTYPES; kinds: of those that have another.
  lacking: copies of tables for heads of multi-token prediction that were not there.
  """
  config: dict[str, Any]
  generation: dict[str, Any]
  kind: str
  kinds: dict[str, str]
  lacking: Sequence[str] = ()


def is_folder(path: str | Path) -> bool:
  """Whether a folder holds a Hugging Face model, in whatever format."""
  path = Path(path)
  return any(any(path.glob(p)) for p in ('*.safetensors', INDEX, *PICKLES))


def read_config(folder: str | Path, name: str = 'config.json') -> dict[str, Any]:
  path = Path(folder) / name
  if not path.is_file():
    raise ValueError(f'{folder} has no {name}')
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path} is no JSON: {error}') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} holds no object')
  return content


def model_config(folder: str | Path, drop: Sequence[str] = ()) -> ModelConfig:
  """The model in a folder: config.json's, without heads of multi-token prediction that it counts
  if none of their tensors is there.

  Args:
    drop: patterns of tensors that shall not count.
  """
  whole, patterns = _counted(folder)
  if not patterns or any(map(_matching(patterns), tensors(folder, drop))):
    return whole
  return hf.model_config(read_config(folder))


def heads(folder: str | Path, drop: Sequence[str] = ()) -> str:
  """A sentence on what `model_config` makes of heads; '': there can be none."""
  whole, patterns = _counted(folder)
  if not patterns:
    return ''
  count = lambda drop: sum(map(_matching(patterns), tensors(folder, drop)))
  there, listed = count(()), ', '.join(patterns)
  if not there:
    return f'no heads of multi-token prediction: no tensor of {listed} is there'
  if not count(drop):
    return f'heads of multi-token prediction are left out: {there} tensors of {listed}'
  return f'{whole.mtp.depth} head(s) of multi-token prediction: {there} tensors of {listed}'


def _counted(folder: str | Path) -> tuple[ModelConfig, tuple[str, ...]]:
  """The model with all heads that config.json counts, and the patterns of tensors that decide."""
  config = read_config(folder)
  try:
    whole = hf.model_config(config, heads=True)
    return whole, hf.of_heads(hf.family_of(config), whole)
  except ValueError as error:
    raise ValueError(f'{folder}: {error}') from error
  except (AttributeError, TypeError, ZeroDivisionError) as error:
    raise ValueError(f'{folder}: config.json has a value that cannot be: {error}') from error


def _matching(patterns: Sequence[str]) -> Callable[[str], bool]:
  return lambda name: any(fnmatch(name, p) for p in patterns)


def read_origin(folder: str | Path) -> Origin:
  kinds = {name: t.kind for name, t in tensors(folder).items()}
  kind = collections.Counter(kinds.values()).most_common(1)[0][0]
  has_generation = (Path(folder) / 'generation_config.json').is_file()
  config = read_config(folder)
  copies = hf.copies(hf.family_of(config), model_config(folder))
  return Origin(config,
                read_config(folder, 'generation_config.json') if has_generation else {},
                kind, {name: k for name, k in kinds.items() if k != kind},
                [p.tensor for p in copies if p.tensor not in kinds])


def tensors(folder: str | Path, drop: Sequence[str] = ()) -> dict[str, Stored]:
  """Every tensor of a folder.

  Args:
    drop: patterns of names that shall not count.

  Raises:
    ValueError: names the file or tensor that is missing, damaged or of another format.
  """
  folder = Path(folder)
  files, index = sorted(folder.glob('*.safetensors')), {}
  if (folder / INDEX).is_file():
    index = read_config(folder, INDEX).get('weight_map', {})
    files = [folder / name for name in sorted(set(index.values()))]
    if lacking := [path.name for path in files if not path.is_file()]:
      raise ValueError(f'{folder}: {INDEX} names {", ".join(lacking)}, which is not there')
  if not files:
    if found := sorted(p.name for pattern in PICKLES for p in folder.glob(pattern)):
      raise ValueError(
          f'{folder} has {", ".join(found[:3])} and no safetensors. Files of that kind are '
          'pickles, which run whatever code is in them when they are opened, and are never read; '
          'have transformers save them again, as safetensors')
    raise ValueError(f'{folder} has no safetensors')
  all_found = {}
  for path in files:
    for name, tensor in read_header(path).items():
      if name in all_found:
        raise ValueError(f'{name} is in {all_found[name].file} and again in {path}')
      all_found[name] = tensor
  for name, file in index.items():
    if name not in all_found or all_found[name].file.name != file:
      raise ValueError(f'{name} is missing in {folder / file}, where {INDEX} says it is')
  dropped = _matching(drop)
  found = {name: t for name, t in all_found.items() if not dropped(name)}
  for name, t in found.items():
    if t.kind not in DTYPES:
      raise ValueError(f'{name} in {t.file} has dtype {t.kind}; known are {", ".join(DTYPES)}')
  return found


def read_header(path: Path) -> dict[str, Stored]:
  """The tensors of a file: eight bytes of length, as much JSON, and the numbers without a gap."""
  size = path.stat().st_size
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if not 2 <= length <= min(LONGEST_HEADER, size - 8):
      raise ValueError(f'{path} is no safetensors file, or cut off in its header')
    try:
      header = json.loads(file.read(length))
      header.pop('__metadata__', None)
      found = {name: Stored(path, 8 + length + t['data_offsets'][0], tuple(t['shape']), t['dtype'])
               for name, t in header.items()}
      ends = {name: 8 + length + t['data_offsets'][1] for name, t in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(f'{path} has a damaged header: {error!r}') from error
  begin = 8 + length
  for name, t in sorted(found.items(), key=lambda item: (item[1].offset, ends[item[0]])):
    if t.kind in DTYPES and ends[name] - t.offset != math.prod(t.shape) * DTYPES[t.kind].itemsize:
      raise ValueError(f'{name} in {path} has {ends[name] - t.offset} bytes, not those of '
                       f'{t.kind} {t.shape}')
    if t.offset != begin:
      raise ValueError(f'{name} in {path} begins at byte {t.offset}, not at {begin}')
    if ends[name] > size:
      raise ValueError(f'{name} in {path} ends at byte {ends[name]}, but the file has only {size}: '
                       'it is cut off')
    begin = ends[name]
  if begin != size:
    raise ValueError(f'{path} has {size - begin} bytes more than its tensors')
  return found


def mapped(tensor: Stored, mode: str = 'r') -> np.ndarray:
  """The tensor's bytes in the file, as an array."""
  return np.memmap(tensor.file, DTYPES[tensor.kind], mode, tensor.offset, tensor.shape)


class Opened:
  """A folder that holds a given model, checked.

  Args:
    cfg: the model; its config must be that of the folder in all but what a run chooses. One without
      heads of multi-token prediction leaves those of the folder out.
    drop: patterns of tensors that shall not count.

  Raises:
    ValueError: another model; tensors that are missing, not wanted or misshapen; a copy that is
      none.
  """

  def __init__(self, folder: str | Path, cfg: ModelConfig, drop: Sequence[str] = ()):
    drop = (*drop, *(() if cfg.mtp.depth else _counted(folder)[1]))
    if other := hf.differences(model_config(folder, drop), cfg):
      listed = '; '.join(f'model.{name} is {mine!r}, there it is {theirs!r}'
                         for name, theirs, mine in other[:5])
      raise ValueError(f'{folder} holds another model: {listed}')
    self._found = tensors(folder, drop)
    shapes, family = {n: t.shape for n, t in self._found.items()}, hf.family_of(read_config(folder))
    try:
      self._plan = hf.plan(family, cfg, shapes)
    except ValueError as error:
      raise ValueError(f'{folder}: {error}') from error
    for copy in hf.copies(family, cfg):
      self._check_copy(copy.tensor, self._plan[copy.path][0].tensor)

  def _check_copy(self, name: str, original: str) -> None:
    if name in self._found:
      one, other = (self._found[n] for n in (name, original))
      if one.kind != other.kind or not np.array_equal(mapped(one), mapped(other)):
        raise ValueError(
            f'{name} in {one.file} is not the same as {original} in {other.file}. Our heads of '
            f'multi-token prediction have no tables of their own; drop {name} for them to take '
            "the model's")

  def dtype(self, path: str) -> np.dtype:
    """The narrowest that holds all a parameter is made of."""
    kinds = {DTYPES[self._found[p.tensor].kind] for p in self._plan[path]}
    return kinds.pop() if len(kinds) == 1 else DTYPES['F32']

  def array(self, path: str, like: jax.ShapeDtypeStruct) -> jax.Array:
    """One parameter, placed as `like` says; every process reads what its devices hold."""
    block = lambda index: hf.read(
        self._plan[path], like.shape, index, lambda name: mapped(self._found[name]), like.dtype)
    if like.sharding is None:
      return jax.device_put(block((slice(None),) * len(like.shape)))
    return jax.make_array_from_callback(like.shape, like.sharding, block)


def load(folder: str | Path, cfg: ModelConfig, abstract_params: Any) -> Any:
  """The folder's parameters, placed and cast as abstract_params says."""
  opened = Opened(folder, cfg)
  return param.unflat({path: opened.array(path, like)
                       for path, like in param.flat(abstract_params).items()})


def save(
    folder: str | Path, cfg: ModelConfig, arrays: Callable[[str], np.ndarray], *,
    origin: Origin | None = None, tokenizer: str | Path = '', ids: Mapping[str, int] | None = None,
    kind: str = '', shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a model as a Hugging Face folder. All processes call it; process 0 writes.

  Args:
    arrays: a parameter by its path, whole; called once for each, in one order.
    origin: what the model came from: its family, its dtypes, its other files; None: the first
      family that can say what the model is.
    tokenizer: folder whose tokenizer files are copied; '': none.
    ids: of special tokens, for a model without an origin.
    kind: dtype of all tensors, a key of DTYPES; '': as they were in the origin, or F32.

  Raises:
    ValueError: the folder exists, or no family can hold the model.
    OSError: it could not be written; then nothing is left of it.
  """
  family, config = describe(cfg, origin)
  pieces = collections.defaultdict(list)
  lacking = origin.lacking if origin else ()
  copies = [p for p in hf.copies(family, cfg) if p.tensor not in lacking]
  for piece in hf.pieces(family, cfg) + copies:
    pieces[piece.path].append(piece)
  kinds = lambda name: kind or (origin.kinds.get(name, origin.kind) if origin else 'F32')
  shapes = {p.tensor: (kinds(p.tensor), p.layout.theirs) for some in pieces.values() for p in some}
  names = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
  if kind or not origin:
    config = {k: v for k, v in config.items() if k != 'torch_dtype'} | {'dtype': names[kinds('')]}
  generation = origin.generation if origin else dict(ids or {})
  config = (config if origin else generation | config)
  mine = jax.process_index() == 0
  with appearing(folder) as partial:
    if mine:
      partial.mkdir(parents=True)
      write_json(partial / 'config.json', config)
      if generation:
        write_json(partial / 'generation_config.json', generation)
      for path in tokenizer_files(tokenizer):
        shutil.copy(path, partial)
      stored = _allocate_shards(partial, shapes, shard_bytes)
    for path, some in pieces.items():
      whole = arrays(path)
      for piece in some if mine else ():
        hf.write(piece, whole[piece.lead], mapped(stored[piece.tensor], 'r+'))


@contextlib.contextmanager
def appearing(folder: str | Path) -> Iterator[Path]:
  """The name a folder has until it is whole, for the caller to make; it is gone after an error.

  All processes may enter; process 0 has the folder.

  Raises:
    ValueError: it is there already.
  """
  folder, mine = Path(folder).absolute(), jax.process_index() == 0
  if mine and folder.exists():
    raise ValueError(f'{folder} exists and is never written over')
  partial = folder.with_name(f'{folder.name}.partial-{os.getpid()}')
  try:
    yield partial
    if mine:
      partial.rename(folder)
  finally:
    if mine:
      shutil.rmtree(partial, ignore_errors=True)


def describe(cfg: ModelConfig, origin: Origin | None) -> tuple[hf.Family, dict[str, Any]]:
  """The family and the config.json of what `save` would write."""
  family = hf.family_of(origin.config) if origin else hf.choose(cfg)
  return family, hf.public_config(family, cfg, origin and origin.config)


def tokenizer_files(folder: str | Path) -> Iterator[Path]:
  """Files of a tokenizer in a folder; of a file's folder."""
  folder = Path(folder)
  folder = folder.parent if folder.is_file() else folder
  return (p for pattern in TOKENIZER for p in sorted(folder.glob(pattern))
          if folder.parts and p.is_file())


def _allocate_shards(
    folder: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]], shard_bytes: int,
) -> dict[str, Stored]:
  """Files with room for all tensors, and where each tensor goes."""
  size = lambda name: DTYPES[shapes[name][0]].itemsize * math.prod(shapes[name][1])
  shards = [[]]
  for name in sorted(shapes):
    if shards[-1] and sum(map(size, shards[-1])) + size(name) > shard_bytes:
      shards.append([])
    shards[-1].append(name)
  stored, one = {}, len(shards) == 1
  for i, names in enumerate(shards, 1):
    file = 'model.safetensors' if one else f'model-{i:05}-of-{len(shards):05}.safetensors'
    stored |= allocate(folder / file, {name: shapes[name] for name in names})
  if not one:
    where = {name: t.file.name for name, t in sorted(stored.items())}
    write_json(folder / INDEX, {
        'metadata': {'total_size': sum(map(size, shapes))}, 'weight_map': where})
  return stored


def allocate(path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Stored]:
  """A safetensors file with its header and room for every tensor.

  Args:
    shapes: {name: (a key of DTYPES, shape)}.
  """
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  # The widest first, as the format's own library puts them: so every tensor is aligned.
  for name in sorted(shapes, key=lambda n: (-DTYPES[shapes[n][0]].itemsize, n)):
    kind, shape = shapes[name]
    begin, end = end, end + DTYPES[kind].itemsize * math.prod(shape)
    header[name] = {'dtype': kind, 'shape': list(shape), 'data_offsets': [begin, end]}
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    file.flush()
    os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)     # a full disk is an error here
  return read_header(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n')
