"""The model's sizes and choices: static under jit, hashable, without mesh or paths."""

import dataclasses

Layer = str | tuple[str, str]          # a mixer, or (mixer, ffn); a bare mixer takes the default FFN

# Logical axis -> mesh axes it is split over (those of size 1 drop out).
RULES = (
    ('batch', ('data', 'fsdp', 'expert')),
    ('time', ()),
    ('embed', ('fsdp',)),
    ('heads', ('model',)),
    ('kv_heads', ('model',)),
    ('head_dim', ()),
    ('key_dim', ()),
    ('value_dim', ()),
    ('ffw', ('model',)),
    ('vocab', ('model',)),
    ('expert', ('expert',)),
    ('layers', ()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A decoder: `head` layers, then `pattern` x `repeats` under one scan, then `tail` layers."""
  vocab_size: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  ffw_dim: int
  pattern: tuple[Layer, ...] = ('attention',)
  repeats: int = 1
  head: tuple[Layer, ...] = ()
  tail: tuple[Layer, ...] = ()
  ffn: str = 'mlp'                     # the FFN of a layer that names only its mixer
  max_length: int = 2048               # tokens of a row: longer rows are refused
  rope_theta: float = 10_000.0
  qk_norm: bool = False
  norm_eps: float = 1e-6
  tied: bool = True                    # the unembedding is the embedding table
  dtype: str = 'float32'               # of matmuls and activations; parameters are float32
  remat: str = 'none'                  # none | full | dots: what the backward pass recomputes
  unroll: bool = False                 # unroll the scan over repeats: longer to compile, 10 to 25 % faster on CPU
  attention: str = 'auto'              # implementation, see kernels/attention
  score_chunk: int = 0                 # positions whose logits exist at once in a train step; 0: chosen by size
  rules: tuple[tuple[str, tuple[str, ...]], ...] = RULES

  def __post_init__(self):
    for name in ('vocab_size', 'embed_dim', 'num_heads', 'num_kv_heads', 'head_dim', 'ffw_dim', 'max_length'):
      if getattr(self, name) < 1:
        raise ValueError(f'model.{name} is {getattr(self, name)}, wanted at least 1')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f'model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}')
    if self.head_dim % 2:
      raise ValueError(f'model.head_dim is {self.head_dim}; rotary embedding needs an even size')
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(f'model.dtype is {self.dtype!r}, wanted float32 or bfloat16')
    if self.remat not in ('none', 'full', 'dots'):
      raise ValueError(f'model.remat is {self.remat!r}, wanted none, full or dots')
    if not self.layers:
      raise ValueError('the model has no layers: head, pattern x repeats and tail are all empty')

  @property
  def layers(self) -> tuple[tuple[str, str], ...]:
    """Every layer as (mixer, ffn), in the order of the model; a layer's name is its index here."""
    entries = (*self.head, *(self.pattern * self.repeats), *self.tail)
    return tuple(pair(entry, self.ffn) for entry in entries)


def pair(layer: Layer, default_ffn: str) -> tuple[str, str]:
  """(mixer, ffn) of one entry of a stack."""
  return (layer, default_ffn) if isinstance(layer, str) else tuple(layer)
