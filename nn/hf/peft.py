"""Adapters as the `peft` package reads them: names, layouts and adapter_config.json.

A public tensor may hold several of our matrices: gate and up of experts, queries and their gates.
Their adapters are then one of a greater rank, in which each has its own rows and zeros elsewhere.

E experts, I inputs and O outputs of our matrix, R rank.
"""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from nn import model, param
from nn.config import LoRA, ModelConfig
from nn.hf import table
from nn.hf.table import Family, Layout, Piece

# Names that peft takes for experts wherever they are, in models that have some.
OF_EXPERTS = ('gate_proj', 'up_proj', 'down_proj', 'w1', 'w2', 'w3')


def export(
    adapters: Mapping[str, Any], cfg: ModelConfig, family: Family, base: str = '',
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """adapter_config.json and the tensors of adapter_model.safetensors.

  Args:
    adapters: the part 'lora' of the parameters, as arrays that numpy takes.
    base: what peft shall call the model without adapters.

  Raises:
    ValueError: names a matrix that peft cannot adapt in models of this family.
  """
  flat = {name: np.asarray(x) for name, x in param.flat(adapters).items()}
  holding = _holding({name.rpartition('/')[0] for name in flat}, cfg, family)
  places, config, tensors = _places(list(holding), family), _config(cfg.lora, base), {}
  for tensor, pieces in holding.items():
    a, b = _join(pieces, flat, cfg.lora.rank)
    kind, target, name = places[tensor]
    config[kind].append(target)
    if len(pieces) > 1:
      rank = len(pieces) * cfg.lora.rank
      config['rank_pattern'][target] = rank
      config['alpha_pattern'][target] = (
          cfg.lora.scale * (rank ** 0.5 if cfg.lora.rslora else rank))
    tensors |= {f'base_model.model.{name}.lora_A.weight': a,
                f'base_model.model.{name}.lora_B.weight': b}
  return config, tensors


def _config(lora: LoRA, base: str) -> dict[str, Any]:
  return {
      'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base,
      'inference_mode': True, 'r': lora.rank, 'lora_alpha': lora.alpha, 'use_rslora': lora.rslora,
      'lora_dropout': 0.0, 'bias': 'none', 'fan_in_fan_out': False, 'target_modules': [],
      'target_parameters': [], 'rank_pattern': {}, 'alpha_pattern': {}}


def _holding(paths: set[str], cfg: ModelConfig, family: Family) -> dict[str, list[Piece]]:
  """{tensor: the cells in it that are adapted}; experts in the tensors that hold all of a layer."""
  specs = param.flat(model.specs(cfg))
  every = [p for some in (family.entries, family.fused)
           for p in table._pieces(some, family, cfg, specs)
           if p.path in paths and not p.path.startswith('mtp/')
           and len(p.layout.theirs) == (3 if 'expert' in specs[p.path].axes else 2)]
  if lacking := sorted(paths - {p.path for p in every}):
    raise ValueError(
        f'peft has no name for adapters of {", ".join(lacking)} in models of type '
        f'{family.model_type}; merge them into the model instead')
  holding = collections.defaultdict(list)
  for piece in every:
    holding[piece.tensor].append(piece)
  return holding


def _places(names: list[str], family: Family) -> dict[str, tuple[str, str, str]]:
  """{tensor: (key of the config it is a target in, target, module the adapter is named after)}.

  In peft a parameter's adapter wraps the module it belongs to; another one of it wraps the wrapper.
  """
  places = {}
  for i, name in enumerate(names):
    module, _, last = name.rpartition('.')
    if last != 'weight':
      outside = sum(other.rpartition('.')[0] == module for other in names[i + 1:])
      places[name] = 'target_parameters', name, module + outside * '.base_layer'
    elif family.fused and module.rpartition('.')[2] in OF_EXPERTS:
      places[name] = 'target_parameters', name, module
    else:
      places[name] = 'target_modules', module, module
  return places


def _join(
    pieces: list[Piece], flat: Mapping[str, np.ndarray], rank: int,
) -> tuple[np.ndarray, np.ndarray]:
  """lora_A [R, I], lora_B [O, R] of a tensor; of one of experts [E R, I], [O, R E]."""
  *experts, num_rows, num_columns = pieces[0].layout.theirs
  a = np.zeros((*experts, len(pieces) * rank, num_columns), np.float32)
  b = np.zeros((*experts, num_rows, len(pieces) * rank), np.float32)
  for i, piece in enumerate(pieces):
    rows, columns = (_indices(piece.layout, axis) for axis in (-2, -1))
    own = slice(i * rank, (i + 1) * rank)
    part = lambda x, *shape: flat[f'{piece.path}/{x}'][piece.lead].reshape(
        *experts, *shape).swapaxes(-1, -2)
    a[..., own, :][..., columns] = part('a', len(columns), rank)
    b[..., own][..., rows, :] = part('b', rank, len(rows))
  if not experts:
    return a, b
  return a.reshape(-1, num_columns), np.moveaxis(b, 0, -1).reshape(num_rows, -1)


def _indices(layout: Layout, axis: int) -> np.ndarray:
  """Where along an axis of the tensor the cell's inputs (-1) or outputs (-2) are, in its order."""
  shape = layout.theirs
  along = np.arange(shape[axis]).reshape(-1, *(1,) * (-1 - axis))
  view = layout.view(np.broadcast_to(along, shape))
  return view[tuple(slice(None) if stride else 0 for stride in view.strides)].ravel()
