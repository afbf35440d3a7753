"""config.json, key by key: nothing in it that could change the model is passed over."""

from collections.abc import Mapping, Sequence
from typing import Any

from nn.config import Layer, ModelConfig

# Of the training that was, of sampling, of files: without effect on the function.
HARMLESS = {
    '_name_or_path', '_sliding_window_pattern', 'architectures', 'attention_dropout', 'auto_map',
    'bos_token_id', 'cache_implementation', 'dtype', 'eos_token_id', 'initializer_range',
    'max_window_layers', 'model_type', 'output_router_logits', 'pad_token_id', 'pretraining_tp',
    'router_aux_loss_coef', 'router_jitter_noise', 'torch_dtype', 'transformers_version',
    'use_cache'}
REQUIRED = object()


class Keys:
  """Reads keys of a config.json and remembers which.

  Args:
    config: its content.
    defaults: of keys that it may leave out.
    heads: whether heads of multi-token prediction count, which config.json may name although there
      are no tensors of theirs.
  """

  def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None,
               heads: bool = False):
    self._config, self._defaults, self._heads = config, defaults or {}, heads
    self._read = set()

  def __call__(self, name: str, default: Any = REQUIRED) -> Any:
    """The value of a key; its default where it is left out or null."""
    self._read.add(name)
    value = self._config.get(name)
    if value is None:
      value = self._defaults.get(name, default)
    if value is REQUIRED:
      raise ValueError(f'config.json has no {name}')
    return value

  def expect(self, name: str, *known: Any) -> Any:
    """The value of a key, one of those that are known."""
    value = self(name)
    if value not in known:
      raise ValueError(
          f'config.json: {name} is {value!r}; known is {" or ".join(map(repr, known))}')
    return value

  def depth(self, name: str, default: int) -> int:
    """The number of heads, which this key says."""
    found = self(name, default)
    return found if self._heads else 0

  def finish(self) -> None:
    """Refuses keys that nobody read, unless they are harmless, null, false or empty."""
    unread = {k: v for k, v in self._config.items() if k not in self._read | HARMLESS}
    if unread := {k: v for k, v in unread.items() if v not in (None, False, [], {}, '')}:
      listed = '; '.join(f'{k} = {v!r}' for k, v in unread.items())
      raise ValueError(f'config.json has keys without a meaning here: {listed}')


def read_sizes(keys: Keys, longest: str = 'max_position_embeddings') -> dict[str, Any]:
  """Fields that every decoder has. longest: the key of its number of positions."""
  heads, width = keys('num_attention_heads'), keys('hidden_size')
  return {
      'vocab_size': keys('vocab_size'), 'embed_dim': width, 'num_heads': heads,
      'num_kv_heads': keys('num_key_value_heads', heads),
      'head_dim': keys('head_dim', width // heads), 'ffw_dim': keys('intermediate_size'),
      'max_length': keys(longest), 'norm_eps': float(keys('rms_norm_eps')),
      'tied': keys('tie_word_embeddings')}


def write_sizes(cfg: ModelConfig) -> dict[str, Any]:
  return {
      'vocab_size': cfg.vocab_size, 'hidden_size': cfg.embed_dim,
      'num_hidden_layers': len(cfg.layers), 'num_attention_heads': cfg.num_heads,
      'num_key_value_heads': cfg.num_kv_heads, 'head_dim': cfg.head_dim,
      'intermediate_size': cfg.ffw_dim, 'max_position_embeddings': cfg.max_length,
      'rms_norm_eps': cfg.norm_eps, 'tie_word_embeddings': cfg.tied}


# Keys of a scaling, their fields of nn.config.Rope, and what they are where left out.
SCALINGS = {
    'linear': {'factor': ('factor', REQUIRED)},
    'llama3': {'factor': ('factor', REQUIRED), 'low_freq_factor': ('slow', REQUIRED),
               'high_freq_factor': ('fast', REQUIRED)},
    'yarn': {'factor': ('factor', 0.0), 'beta_slow': ('slow', 1.0), 'beta_fast': ('fast', 32.0),
             'attention_factor': ('gain', 0.0), 'mscale': ('mscale', 0.0),
             'mscale_all_dim': ('mscale_all_dim', 0.0), 'truncate': ('truncate', True)},
}


def read_rope(
    keys: Keys, *, kind: str = '', partial: bool = False, ignored: Sequence[str] = (),
) -> dict[str, Any]:
  """The fields rope_theta, rope and rope_share.

  Args:
    kind: of layers, where config.json has rope_parameters for each.
    partial: the family knows heads of which only a share is turned.
    ignored: rope_parameters without effect on text.
  """
  found = {'rope_theta': keys('rope_theta', None), **_scaling(keys('rope_scaling', {}))}
  if (share := keys('partial_rotary_factor', None)) is not None:
    found['partial_rotary_factor'] = share
  given = keys('rope_parameters', {})
  found |= _scaling(given.get(kind) or {} if kind and kind in given else given)
  found = {name: value for name, value in found.items() if name not in ignored}
  return rope_fields(found, keys('max_position_embeddings'), partial)


def rope_fields(found: dict[str, Any], longest: int, partial: bool) -> dict[str, Any]:
  """The same from one dict of rope_parameters. longest: positions, where it is left out there."""
  found = {name: value for name, value in found.items() if value is not None}
  name = found.pop('rope_type', 'default')
  if name not in ('default', *SCALINGS):
    raise ValueError(f'config.json: rope_type is {name!r}; known are default, '
                     f'{", ".join(SCALINGS)}')
  if 'rope_theta' not in found:
    raise ValueError('config.json has no rope_theta')
  fields = {'rope_theta': float(found.pop('rope_theta')), 'rope': {}}
  share = found.pop('partial_rotary_factor', 1.0)
  if share != 1 and not partial:
    raise ValueError(f'config.json: partial_rotary_factor is {share}, which this model_type lacks')
  fields['rope_share'] = float(share)
  length = found.pop('original_max_position_embeddings', longest)
  if name != 'default':
    rope = {'kind': name} | ({} if name == 'linear' else {'length': length})
    for key, (field, default) in SCALINGS[name].items():
      value = found.pop(key, default)
      if value is REQUIRED:
        raise ValueError(f'config.json: rope_type {name!r} needs {key}')
      rope[field] = value if isinstance(value, bool) else float(value)
    rope['factor'] = rope['factor'] or longest / length
    fields['rope'] = rope
  if found:
    raise ValueError(f'config.json: rope_type {name!r} has no {", ".join(sorted(found))}')
  return fields


def write_rope(cfg: ModelConfig, *, partial: bool = False) -> dict[str, Any]:
  """rope_parameters."""
  rope = cfg.rope
  out = {'rope_type': rope.kind or 'default', 'rope_theta': cfg.rope_theta}
  if partial:
    out['partial_rotary_factor'] = cfg.rope_share
  if rope.kind in ('llama3', 'yarn'):
    out['original_max_position_embeddings'] = rope.length
  for key, (field, default) in SCALINGS.get(rope.kind, {}).items():
    value = rope.turns if field == 'fast' else getattr(rope, field)
    if value != default:
      out[key] = value
  return out


def stack(layers: Sequence[tuple[str, str]]) -> dict[str, Any]:
  """head, pattern, repeats, tail and ffn of a list of layers, with the fewest different entries."""
  count, best = len(layers), None
  for head in range(count):
    for period in range(1, count - head + 1):
      pattern, repeats = layers[head:head + period], 1
      while layers[head + repeats * period:head + (repeats + 1) * period] == pattern:
        repeats += 1
      size = count - (repeats - 1) * period
      if best is None or (size, head) < best[:2]:
        best = size, head, period, repeats
  _, head, period, repeats = best
  ffn = 'moe' if all(f == 'moe' for _, f in layers) else 'mlp'
  entries: list[Layer] = [mixer if f == ffn else (mixer, f) for mixer, f in layers]
  return {'head': tuple(entries[:head]), 'pattern': tuple(entries[head:head + period]),
          'repeats': repeats, 'tail': tuple(entries[head + repeats * period:]), 'ffn': ffn}


def read_mtp(
    depth: int, mixer: str, ffn: str, order: tuple[str, ...] = ('embedding', 'hidden'),
) -> dict[str, Any]:
  """The field mtp, as public families have heads.

  They join the embedding with what is behind the last norm, of the model or the head before: our
  reading of engines that draft with them. Some of these also set the embedding that a text's first
  pair has to 0; heads here read it, as arXiv:2412.19437 has it.
  """
  return {'mtp': {'depth': depth, 'layer': (mixer, ffn), 'order': order, 'hidden': 'after'}
          if depth else {}}


def _scaling(given: Mapping[str, Any]) -> dict[str, Any]:
  """A dict of rope parameters with the older name of its type made the present one."""
  given = dict(given)
  if (old := given.pop('type', None)) is not None and given.setdefault('rope_type', old) != old:
    raise ValueError(f'config.json: rope_type is {given["rope_type"]!r}, and type {old!r}')
  return given
