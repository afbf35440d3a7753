"""The format of models that no public class computes, such as stacks with FG2-GDN layers.

config.json has model_type 'nacre' and, under 'model', the fields of nn.config.ModelConfig but for
those a run chooses (RUN_FIELDS). There is one tensor per parameter of a layer, in the layout of our
tables (docs are the `specs` of nn/ and moe/, experts stacked): 'layers.<index>.' and the path below
the layer, or the whole path, with dots, as 'layers.0.mixer.q' and 'embed.table'.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nn import model, param
from nn.config import RUN_FIELDS, ModelConfig, from_dict
from nn.hf.keys import Keys
from nn.hf.table import Entry, Family

MODEL_TYPE = 'nacre'


def family(cfg: ModelConfig) -> Family:
  """The table of one model: its own specs."""
  specs, sizes, entries = param.flat(model.specs(cfg)), {}, {}

  def add(prefix, path, shape, of):
    factors = [f'{"/".join(of)}:{path}:{i}' for i in range(len(shape))]
    layout = ' '.join(factors)
    sizes.update(zip(factors, shape))
    entry = Entry(prefix + path.replace('/', '.'), path, f'{layout} -> {layout}', of=of)
    entries[entry] = None

  below = set()
  for (place, lead), (mixer, ffn) in zip(model.places(cfg), cfg.layers, strict=True):
    owners = {'mixer': (mixer,), 'ffn': (ffn,)}
    for path in (p for p in specs if p.startswith(f'{place}/')):
      below.add(path)
      inner = path.removeprefix(f'{place}/')
      add('layers.{layer}.', inner, specs[path].shape[len(lead):], owners.get(inner.split('/')[0], ()))
  for path in (p for p in specs if p not in below):
    add('', path, specs[path].shape, ())
  return Family(model_type=MODEL_TYPE, architecture='NacreForCausalLM', entries=tuple(entries),
                sizes=lambda cfg: sizes, read=read, write=write)


def of_config(config: Mapping[str, Any]) -> Family:
  """The table of the model that a config.json describes."""
  return family(model_config(config.get('model', {})))


def model_config(fields: Mapping[str, Any]) -> ModelConfig:
  try:
    return from_dict(fields)
  except TypeError as error:           # of the constructors: fields that are missing or unknown
    raise ValueError(f'config.json: model is not what this version knows: {error}') from error


def read(keys: Keys) -> dict[str, Any]:
  return keys('model')


def write(cfg: ModelConfig) -> dict[str, Any]:
  fields = dataclasses.asdict(cfg)
  for part, names in RUN_FIELDS.items():
    block = fields[part] if part else fields
    for name in set(names) - {'max_length'}:
      del block[name]
  return {'model': fields}
