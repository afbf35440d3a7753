"""What launch/convert.py does. One process; parameters one at a time on the way out."""

import dataclasses
import fnmatch
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from data import tokenizer as tokenizer_lib
from launch import checkpoint, hf_files, models, talk
from launch import mesh as mesh_lib
from nn import lora, model, param


def to_checkpoint(
    source: str, target: str, mesh: str = 'data=1', drop: Sequence[str] = (), warm_start: str = '',
) -> int:
  """Writes a Hugging Face folder as a step folder; returns the number of parameters.

  Parameters keep the dtype of their tensors, which is exact and half the size of float32 where that
  is bfloat16; whoever loads them casts.

  Args:
    mesh: 'axis=devices,...', over which the parameters are spread meanwhile.
    drop: patterns of tensors to leave out.
    warm_start: variant that layers of linear attention become, without a change of the function;
      '': they stay. The model then is no longer one of the folder's type.
  """
  with hf_files.appearing(target) as partial:
    for pattern in drop:
      if not fnmatch.filter(hf_files.tensors(source), pattern):
        raise ValueError(f'--drop {pattern}: {source} has no such tensor')
    known = models.describe(source, drop)
    if known.tokenizer and (Path(source) / 'tokenizer.json').is_file():
      tokenizer_lib.load(known.tokenizer)              # a damaged one is refused here
    opened = hf_files.Opened(source, known.cfg, drop)
    specs, sizes = model.specs(known.cfg), talk.mesh_sizes(mesh)
    places = param.flat(param.shardings(specs, mesh_lib.make_mesh(sizes), dict(known.cfg.rules)))
    params = param.unflat({
        path: opened.array(
            path, jax.ShapeDtypeStruct(s.shape, opened.dtype(path), sharding=places[path]))
        for path, s in param.flat(specs).items()})
    cfg, origin = known.cfg, known.origin
    if warm_start:
      params, cfg = model.warm_start(params, cfg, warm_start)
      origin = None
    folder = 'tokenizer' if known.tokenizer else ''
    meta = {'model': dataclasses.asdict(cfg), 'tokenizer': folder, 'step': 0,
            **models.to_meta(origin)}
    checkpoint.save_params(partial, params, meta)
    if folder:
      (partial / folder).mkdir()
      for path in hf_files.tokenizer_files(known.tokenizer):
        shutil.copy(path, partial / folder)
  return param.count(model.specs(cfg))


def to_public(source: str, target: str, dtype: str = '', tokenizer: str = '') -> int:
  """Writes a checkpoint as a Hugging Face folder; returns the number of parameters.

  Adapters are merged.
  """
  known = models.describe(source)
  kind = next((k for k, d in hf_files.DTYPES.items() if d.name == dtype), '')
  tokenizer = tokenizer or known.tokenizer
  with checkpoint.reader(source) as array:
    merged = lora.merging(array, model.specs(known.cfg), known.cfg.lora)
    hf_files.save(
        target, known.cfg, lambda path: np.asarray(merged(path)), origin=known.origin, kind=kind,
        tokenizer='' if tokenizer == 'bytes' else tokenizer, ids=models.special_ids(tokenizer))
  return param.count(lora.base(model.specs(known.cfg)))
