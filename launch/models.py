"""What a `<ckpt>` holds: the workdir of a run, a step folder, what launch/convert.py wrote, or a
Hugging Face folder.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import base
from data import tokenizer as tokenizer_lib
from launch import checkpoint, growth, hf_files
from launch import config as config_lib
from nn.config import PARTS, RUN_FIELDS, ModelConfig, from_dict


class Known(NamedTuple):
  """What is known of a model beside its parameters."""
  cfg: ModelConfig
  tokenizer: str                       # as data.tokenizer.load takes it; '': unknown
  origin: hf_files.Origin | None       # the public folder that it came from


def describe(path: str | Path, drop: Sequence[str] = ()) -> Known:
  """What a checkpoint says of its model; reads no parameters.

  Args:
    drop: patterns of tensors of a Hugging Face folder that shall not count.

  Raises:
    ValueError: there is no checkpoint, or it holds parameters alone.
  """
  if hf_files.is_folder(path):
    has_tokenizer = any(hf_files.tokenizer_files(path))
    return Known(hf_files.model_config(path, drop), str(path) if has_tokenizer else '',
                 hf_files.read_origin(path))
  folder = checkpoint.find(path)
  meta = checkpoint.read_meta(folder)
  if 'model' in meta:
    tokenizer = folder / meta['tokenizer'] if meta['tokenizer'] else ''
    return Known(from_dict(meta['model']), str(tokenizer), from_meta(meta))
  if 'config' not in meta:
    raise ValueError(f'{folder} holds parameters alone, without config and tokenizer; give the '
                     'folder of a run, of launch/convert.py, or of Hugging Face')
  config = config_lib.from_json(json.dumps(meta['config']))
  size = tokenizer_lib.load(config.tokenizer).vocab_size
  return Known(growth.model_at(config, size, meta['step']), config.tokenizer, from_meta(meta))


def adopt(config: ConfigDict, path: str, explicit: Sequence[str]) -> None:
  """Puts the model of a checkpoint into config.model, but for what is a run's choice.

  Args:
    path: of the checkpoint; '': nothing changes.
    explicit: keys that the command line names.

  Raises:
    ValueError: config.model says otherwise.
  """
  if not path:
    return
  fields = dataclasses.asdict(describe(path).cfg)
  defaults = base.get_config().model

  def visit(block, default, found, part):
    for name in default:
      key = f'model.{part}{name}'
      if name in RUN_FIELDS.get(part.strip('.'), ()):
        continue
      if not part and name == 'mtp' and (
          not found['mtp']['depth'] or 'model.mtp.depth' in explicit and not block.mtp.depth):
        continue                         # heads may be added, and left out
      if not part and name in PARTS:
        visit(block[name], default[name], found[name], f'{name}.')
        continue
      value = config_lib.convert(found[name], *config_lib.kind(default, name))
      mine = block[name]
      if mine != value and (mine != default[name] or key in explicit):
        raise ValueError(f'{key} is {mine!r}, and in model_from, {path}, it is '
                         f'{value!r}; leave it out, or model_from')
      with block.unlocked():
        block[name] = value

  visit(config.model, defaults, fields, '')


def origin_of(init: str, saved: dict[str, Any] | None) -> hf_files.Origin | None:
  """The public folder that a run's parameters came from; None: they did not.

  Args:
    saved: the meta data of the checkpoint that the run goes on from.
  """
  if saved:
    return from_meta(saved)
  if not init:
    return None
  if hf_files.is_folder(init):
    return hf_files.read_origin(init)
  return from_meta(checkpoint.read_meta(checkpoint.find(init)))


def to_meta(origin: hf_files.Origin | None) -> dict[str, Any]:
  """The entry of a checkpoint's meta data that `from_meta` reads."""
  return {'hf': dataclasses.asdict(origin)} if origin else {}


def from_meta(meta: dict[str, Any]) -> hf_files.Origin | None:
  """The public folder that a checkpoint came from, by its meta data."""
  return hf_files.Origin(**meta['hf']) if meta.get('hf') else None


def special_ids(tokenizer: str) -> dict[str, int]:
  """{'eos_token_id': id, ...}, as config.json wants them; {} without a tokenizer."""
  if not tokenizer:
    return {}
  loaded = tokenizer_lib.load(tokenizer)
  ids = {
      'bos_token_id': loaded.bos_id, 'eos_token_id': loaded.eos_id, 'pad_token_id': loaded.pad_id}
  return {name: i for name, i in ids.items() if i is not None}
