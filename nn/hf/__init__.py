"""Public checkpoints: names, layouts and configs. Files are launch's."""

from collections.abc import Mapping
from typing import Any

from nn.config import ModelConfig, architecture, from_dict
from nn.hf import hybrid, latent, llama, own
from nn.hf.keys import Keys
from nn.hf.table import Family, Piece, copies, of_heads, pieces, plan, read, write

FAMILIES = {f.model_type: f for f in (
    llama.LLAMA, llama.QWEN2, llama.MIMO, llama.QWEN3, llama.QWEN3_MOE, llama.MIXTRAL, llama.GEMMA3,
    latent.DEEPSEEK_V3, latent.GLM4_MOE, hybrid.QWEN3_NEXT, hybrid.QWEN3_5, hybrid.QWEN3_5_MOE,
    hybrid.KIMI_LINEAR)}

__all__ = ['FAMILIES', 'Family', 'Piece', 'choose', 'copies', 'differences', 'family_of',
           'model_config', 'of_heads', 'pieces', 'plan', 'public_config', 'read', 'write']


def family_of(config: Mapping[str, Any]) -> Family:
  """The family of a config.json."""
  name = _text(config).get('model_type')
  if name == own.MODEL_TYPE:
    return own.of_config(config)
  if name not in FAMILIES:
    raise ValueError(f'config.json: model_type is {name!r}; known are {", ".join(FAMILIES)}, '
                     f'{", ".join(hybrid.WITH_TEXT)}, {own.MODEL_TYPE}')
  return FAMILIES[name]


def model_config(config: Mapping[str, Any], heads: bool = False) -> ModelConfig:
  """The model that a config.json describes.

  Args:
    heads: with the heads of multi-token prediction that it counts. Published folders often lack
      their tensors, since transformers reads none, so those decide, see Family.heads.

  Raises:
    ValueError: names keys that are missing, or that say what our model does not do.
  """
  if config.get('quantization_config'):
    raise ValueError('config.json has a quantization_config; only whole floats are read')
  family = family_of(config)
  keys = Keys(_text(config), family.defaults, heads)
  fields = family.read(keys)
  keys.finish()
  return from_dict(fields)


def public_config(
    family: Family, cfg: ModelConfig, original: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """The config.json of a model.

  Args:
    original: the one it came with; kept as it is where it still describes the model, and otherwise
      whatever of it has nothing to do with the function.

  Raises:
    ValueError: names what the family cannot say of the model.
  """
  original, heads = _text(original or {}), cfg.mtp.depth > 0
  if original and not differences(model_config(original, heads), cfg):
    return dict(original)
  new = {'architectures': [family.architecture], 'model_type': family.model_type,
         **family.write(cfg)}
  if lost := differences(model_config(new, heads), cfg):
    listed = '; '.join(f'model.{name} is {mine!r}, not {theirs!r}' for name, theirs, mine in lost)
    raise ValueError(f'a model of type {family.model_type} cannot say that {listed}')
  kept = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'initializer_range')
  return {**{k: v for k, v in original.items() if k in kept}, **new}


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
  """A config.json, or the part of it that is about text, as the model of that alone has it."""
  family = hybrid.WITH_TEXT.get(config.get('model_type'))
  if family is None:
    return config
  tied = {k: v for k, v in config.items() if k == 'tie_word_embeddings'}
  return {**config.get('text_config', {}), **tied, 'model_type': family.model_type,
          'architectures': [family.architecture]}


def choose(cfg: ModelConfig) -> Family:
  """The first family that can say what a model is; where none can, a format of our own."""
  for family in FAMILIES.values():
    try:
      public_config(family, cfg)
      pieces(family, cfg)
      return family
    except ValueError:
      pass
  return own.family(cfg)


def differences(a: ModelConfig, b: ModelConfig) -> list[tuple[str, Any, Any]]:
  """(field, in a, in b) where two configs describe different functions."""
  a, b = architecture(a), architecture(b)
  return [(name, a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys())
          if a.get(name) != b.get(name)]
