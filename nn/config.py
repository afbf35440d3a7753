"""The model's sizes and choices: static under jit, hashable, without mesh or paths."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

Layer = str | tuple[str, str]          # a mixer, or (mixer, ffn); a bare one takes the default FFN

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
    ('rank', ()),
    ('adapter', ()),
    ('conv', ()),
    ('ffw', ('model',)),
    ('vocab', ('model',)),
    ('expert', ('expert',)),
    ('layers', ()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GDN:
  """The linear-attention mixer, see `nn/gdn.py`. 0, where allowed, is the value in brackets."""
  variant: str = 'fg2_plus'            # gdn | kda | fg2 | fg2_plus | gdn2, see kernels/fg2_gdn
  num_heads: int = 0                   # value heads (model.num_heads)
  num_key_heads: int = 0               # a divisor of num_heads (num_heads)
  key_dim: int = 0                     # K (model.head_dim)
  value_dim: int = 0                   # V (model.head_dim)
  conv: int = 4                        # tokens that the short convolution of q, k and v sees
  # Of the decay's projection; 0: full; -1: value_dim. gdn has one decay per head.
  decay_rank: int = -1
  beta_rank: int = 0                   # of the projections of gates per channel; 0: full
  gate_rank: int = -1                  # of the output gate's; 0: full; -1: value_dim, full for gdn
  gate: str = ''                       # silu | sigmoid, of the output gate (sigmoid; silu for gdn)
  lower_bound: float = 0.0             # of the log-decay, as -5; 0: none
  negative: bool = False               # learning rates up to 2 instead of 1
  norm_eps: float = 1e-5               # of the norm of the output
  implementation: str = 'auto'         # see kernels/fg2_gdn
  chunk: int = 0                       # tokens of a chunk (by platform)

  def __post_init__(self):
    variants = ('gdn', 'kda', 'fg2', 'fg2_plus', 'gdn2')
    if self.variant not in variants:
      raise ValueError(
          f'model.gdn.variant is {self.variant!r}, wanted one of {", ".join(variants)}')
    if self.gate not in ('', 'silu', 'sigmoid'):
      raise ValueError(f'model.gdn.gate is {self.gate!r}, wanted silu or sigmoid')
    if self.conv < 1:
      raise ValueError(f'model.gdn.conv is {self.conv}, wanted at least 1: the token itself')
    if self.lower_bound > 0:
      raise ValueError(f'model.gdn.lower_bound is {self.lower_bound}; log-decays are below 0')
    for name in ('num_heads', 'num_key_heads', 'key_dim', 'value_dim', 'beta_rank', 'chunk'):
      if getattr(self, name) < 0:
        raise ValueError(f'model.gdn.{name} is {getattr(self, name)}, wanted at least 0')
    for name in ('decay_rank', 'gate_rank'):
      if getattr(self, name) < -1:
        raise ValueError(f'model.gdn.{name} is {getattr(self, name)}, wanted at least -1')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLA:
  """Latent attention, see `nn/mla.py`.

  What stands in brackets are DeepSeek-V2's ratios, for 0 and for a rope_dim of -1.
  """
  q_rank: int = 0                      # of the queries' latent; 0: queries come straight from x
  kv_rank: int = 0                     # of the latent of keys and values (4 x model.head_dim)
  nope_dim: int = 0                    # of a head's q and k, without positions (model.head_dim)
  # Channels besides, turned, whose key all heads share (model.head_dim / 2); 0: none.
  rope_dim: int = -1
  value_dim: int = 0                   # of a head (model.head_dim)
  interleaved: bool = False            # turns pairs (2i, 2i + 1), as DeepSeek's, not (i, i + half)
  norm_eps: float = 1e-6               # of the norms of latents

  def __post_init__(self):
    for name in ('q_rank', 'kv_rank', 'nope_dim', 'value_dim'):
      if getattr(self, name) < 0:
        raise ValueError(f'model.mla.{name} is {getattr(self, name)}, wanted at least 0')
    if self.rope_dim < -1:
      raise ValueError(f'model.mla.rope_dim is {self.rope_dim}, wanted at least -1')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
  """The FFN 'moe', see `moe/layer.py`.

  Qwen3-MoE, Qwen3-Next, DeepSeek-V3 and GLM-4.5 are settings of these fields.
  """
  experts: int = 8                     # E
  top_k: int = 2                       # experts a token goes to
  # Inner width of an expert; 0: model.ffw_dim / top_k, the dense layer's active width.
  ffw_dim: int = 0
  scores: str = 'softmax'              # softmax over all of the router's logits, or sigmoid of each
  renormalise: bool = True             # the gates of a token sum to 1 before scale
  scale: float = 1.0                   # the gates are multiplied by it
  groups: int = 1                      # the experts lie in this many groups, side by side,
  top_groups: int = 1                  # and a token's in this many, those whose best score highest
  shared_dim: int = 0                  # inner width of what every token takes besides; 0: nothing
  shared_gate: bool = False            # times a sigmoid gate of its own
  balance_loss: float = 0.0            # coefficient of the Switch loss, which is 1 for even loads
  z_loss: float = 0.0                  # coefficient of the router's mean squared log-normaliser
  bias_rate: float = 0.0               # step of the selection bias to even loads; 0: none, or fixed
  bias: bool = False                   # there is one without a rate, too: a checkpoint's, fixed
  matmul: str = 'auto'                 # implementation, see kernels/grouped_matmul
  # Each device sorts its own tokens, or 'global': the compiler splits one sort of all.
  dispatch: str = 'auto'
  # Where rows travel to experts on other devices: rows that a device has room for in a train step,
  # as a multiple of its share under even loads, of at least 1. What does not fit is dropped and
  # counted, as load/dropped. 0: the worst case, nothing is dropped.
  buffer: float = 0.0

  def __post_init__(self):
    for name in ('experts', 'top_k', 'groups', 'top_groups'):
      if getattr(self, name) < 1:
        raise ValueError(f'model.moe.{name} is {getattr(self, name)}, wanted at least 1')
    for name in ('ffw_dim', 'shared_dim', 'balance_loss', 'z_loss', 'bias_rate'):
      if getattr(self, name) < 0:
        raise ValueError(f'model.moe.{name} is {getattr(self, name)}, wanted at least 0')
    if self.scores not in ('softmax', 'sigmoid'):
      raise ValueError(f'model.moe.scores is {self.scores!r}, wanted softmax or sigmoid')
    if self.dispatch not in ('auto', 'global'):
      raise ValueError(f'model.moe.dispatch is {self.dispatch!r}, wanted auto or global')
    if self.buffer and not 1 <= self.buffer < math.inf:
      raise ValueError(f'model.moe.buffer is {self.buffer}, wanted at least 1, room for even '
                       'loads, or 0 for the worst case')
    if self.buffer and self.dispatch == 'global':
      raise ValueError(f'model.moe.buffer is {self.buffer}, which has no effect where '
                       "model.moe.dispatch is 'global'; leave one of them out")
    if self.experts % self.groups:
      raise ValueError(f'model.moe.experts {self.experts} is not a multiple of '
                       f'model.moe.groups {self.groups}')
    if self.top_groups > self.groups:
      raise ValueError(f'model.moe.top_groups {self.top_groups} is more than '
                       f'model.moe.groups {self.groups}')
    if self.top_k > (reachable := self.experts // self.groups * self.top_groups):
      raise ValueError(f'model.moe.top_k {self.top_k} is more than the {reachable} experts '
                       'a token can reach')
    if self.shared_gate and not self.shared_dim:
      raise ValueError('model.moe.shared_gate is set and model.moe.shared_dim is 0: '
                       'there is nothing to gate')

  @property
  def has_bias(self) -> bool:
    """Whether a selection bias is added to the scores in the choice."""
    return self.bias or self.bias_rate > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """Rotary angles of a longer context, made of those of a shorter one, see `nn/rope.py`."""
  kind: str = ''                       # linear | llama3 | yarn; '': they stay as they are
  factor: float = 1.0                  # the context is that many times as long
  length: int = 0                      # llama3, yarn: tokens of the shorter one
  # llama3, yarn: angles that turn less often in it than slow are divided by factor, those that
  # turn more often than fast stay; a fast of 0 is 4 for llama3, 32 for yarn.
  slow: float = 1.0
  fast: float = 0.0
  truncate: bool = True                # yarn: the borders between them are whole dimensions
  gain: float = 0.0                    # yarn: of the turned q and k; 0: by factor and the next two
  mscale: float = 0.0                  # yarn: weight of the logarithm of factor in the gain, and
  mscale_all_dim: float = 0.0          # the weight in its divisor; 0 in one of them: 1, by nothing

  def __post_init__(self):
    kinds = ('', 'linear', 'llama3', 'yarn')
    if self.kind not in kinds:
      raise ValueError(
          f'model.rope.kind is {self.kind!r}, wanted one of {", ".join(kinds[1:])}, or none')
    if not self.kind and any(getattr(self, f.name) != f.default for f in dataclasses.fields(self)):
      raise ValueError('model.rope is set and model.rope.kind is not: nothing would be scaled')
    if self.factor <= 0:
      raise ValueError(f'model.rope.factor is {self.factor}, wanted more than 0')
    if self.kind in ('llama3', 'yarn') and self.length < 1:
      raise ValueError(f'model.rope.length is {self.length}; {self.kind} needs the length '
                       'before the extension')
    if self.kind in ('llama3', 'yarn') and not 0 < self.slow < self.turns:
      raise ValueError(f'model.rope.slow is {self.slow}, wanted between 0 and model.rope.fast, '
                       f'{self.turns}')
    for name in ('gain', 'mscale', 'mscale_all_dim'):
      if getattr(self, name) < 0:
        raise ValueError(f'model.rope.{name} is {getattr(self, name)}, wanted at least 0')

  @property
  def turns(self) -> float:
    """`fast`, not 0."""
    return self.fast or {'llama3': 4.0, 'yarn': 32.0}.get(self.kind, 0.0)

  @property
  def attention_gain(self) -> float:
    """What turned queries and keys are multiplied by (arXiv:2309.00071, section 3.4)."""
    if self.kind != 'yarn':
      return 1.0
    both = self.mscale and self.mscale_all_dim
    return self.gain or (
        self.log_gain(self.mscale) / self.latent_gain if both else self.log_gain(1.0))

  @property
  def latent_gain(self) -> float:
    """What latent attention multiplies q and k by, turned or not, as DeepSeek's code does."""
    return self.log_gain(self.mscale_all_dim) if self.kind == 'yarn' else 1.0

  def log_gain(self, weight: float) -> float:
    return max(1.0, 0.1 * weight * math.log(self.factor) + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
  """Low-rank adapters, see `nn/lora.py`. With them, nothing else is trained."""
  rank: int = 0                        # of a change; 0: no adapters
  alpha: float = 16.0                  # a change is alpha / rank times the product of its matrices,
  rslora: bool = False                 # or alpha / sqrt(rank) (arXiv:2312.03732)
  targets: tuple[str, ...] = ('*',)    # matrices of layers, as '*/mixer/*'; * spans slashes, too

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(f'model.lora.rank is {self.rank}, wanted at least 1, or 0 for no adapters')
    if not self.alpha > 0:
      raise ValueError(f'model.lora.alpha is {self.alpha}, wanted more than 0')
    if not self.targets:
      raise ValueError("model.lora.targets is empty; name matrices, as '*/mixer/*', or set "
                       'model.lora.rank to 0')

  @property
  def scale(self) -> float:
    return self.alpha / (self.rank ** 0.5 if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTP:
  """Multi-token prediction, see `nn/mtp.py`."""
  depth: int = 0                       # heads, each for one token further ahead; 0: none
  layer: tuple[str, ...] = ()          # (mixer, ffn) of the layer in each; (): the model's last
  # In which the two are joined; many checkpoints: embedding first.
  order: tuple[str, ...] = ('hidden', 'embedding')
  # Each takes what is behind the last norm of the one before, or in front: 'before'.
  hidden: str = 'after'

  def __post_init__(self):
    if self.depth < 0:
      raise ValueError(f'model.mtp.depth is {self.depth}, wanted at least 1, or 0 for no heads')
    if not self.depth and any(getattr(self, f.name) != f.default for f in dataclasses.fields(self)):
      raise ValueError('model.mtp is set and model.mtp.depth is 0: there are no heads; '
                       'wanted at least 1')
    if len(self.layer) not in (0, 2):
      raise ValueError(f'model.mtp.layer is {self.layer}, wanted a mixer and an FFN, or ()')
    if sorted(self.order) != ['embedding', 'hidden']:
      raise ValueError(f'model.mtp.order is {self.order}, wanted hidden and embedding in '
                       'either order')
    if self.hidden not in ('before', 'after'):
      raise ValueError(f'model.mtp.hidden is {self.hidden!r}, wanted before or after')


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
  ffn: str = 'mlp'                     # the FFN of a layer that names only its mixer: mlp or moe
  moe: MoE = MoE()
  max_length: int = 2048               # tokens of a row: longer rows are refused
  gdn: GDN = GDN()                     # of the mixer 'gdn'
  mla: MLA = MLA()                     # of the mixer 'mla'
  lora: LoRA = LoRA()                  # adapters
  mtp: MTP = MTP()                     # heads for tokens further ahead
  rope_theta: float = 10_000.0         # base of the rotary angles; 0: attention without positions
  rope_share: float = 1.0              # of a head's elements that are turned, the first ones
  rope: Rope = Rope()                  # for contexts longer than those of pretraining
  window: int = 0                      # tokens that the mixer 'local' sees, with the token itself
  local_theta: float = 10_000.0        # base of its angles, untouched by `rope`; 0: no positions
  qk_norm: bool = False
  attention_bias: tuple[str, ...] = () # projections of attention with a bias: of q, k, v, gate, o
  attention_gate: bool = False         # heads times sigmoid(gate(x)), before the last projection
  query_scalar: int = 0                # attention scores are divided by its root; 0: head_dim
  norm_eps: float = 1e-6
  unit_offset: bool = False            # norms of q, k and layers multiply by 1 + their parameter
  post_norms: bool = False             # of what mixer and FFN return, too
  activation: str = 'silu'             # of the FFN 'mlp': silu or gelu_tanh
  scale_embed: bool = False            # embeddings times the root of embed_dim
  tied: bool = True                    # the unembedding is the embedding table
  dtype: str = 'float32'               # of matmuls and activations; parameters are float32
  remat: str = 'none'                  # none | full | dots: what the backward pass recomputes
  unroll: bool = False                 # of the scan: longer to compile, 10 to 25 % faster on CPU
  attention: str = 'auto'              # implementation, see kernels/attention
  score_chunk: int = 0                 # positions with logits at once in a train step; 0: by size
  rules: tuple[tuple[str, tuple[str, ...]], ...] = RULES

  def __post_init__(self):
    for name in ('vocab_size', 'embed_dim', 'num_heads', 'num_kv_heads', 'head_dim', 'ffw_dim',
                 'max_length'):
      if getattr(self, name) < 1:
        raise ValueError(f'model.{name} is {getattr(self, name)}, wanted at least 1')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f'model.num_heads {self.num_heads} is not a multiple of '
                       f'model.num_kv_heads {self.num_kv_heads}')
    if self.head_dim % 2 and self.rope_theta:
      raise ValueError(f'model.head_dim is {self.head_dim}; rotary embedding needs an even size')
    if not 0 < self.rope_share <= 1 or int(self.head_dim * self.rope_share) % 2 and self.rope_theta:
      raise ValueError(f'model.rope_share is {self.rope_share}; of model.head_dim '
                       f'{self.head_dim}, an even number of elements is turned, or all')
    for name in ('rope_theta', 'local_theta'):
      if getattr(self, name) < 0:
        raise ValueError(
            f'model.{name} is {getattr(self, name)}, wanted a base, or 0 for no positions')
    for name in ('window', 'query_scalar'):
      if getattr(self, name) < 0:
        raise ValueError(f'model.{name} is {getattr(self, name)}, wanted at least 0')
    if unknown := set(self.attention_bias) - {
        'q', 'k', 'v', 'o', *(('gate',) if self.attention_gate else ())}:
      raise ValueError(f'model.attention_bias names {sorted(unknown)}; projections are q, k, v, o, '
                       'and gate with model.attention_gate')
    if self.activation not in ('silu', 'gelu_tanh'):
      raise ValueError(f'model.activation is {self.activation!r}, wanted silu or gelu_tanh')
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(f'model.dtype is {self.dtype!r}, wanted float32 or bfloat16')
    if self.remat not in ('none', 'full', 'dots'):
      raise ValueError(f'model.remat is {self.remat!r}, wanted none, full or dots')
    if (any(ffn == 'moe' for _, ffn in self.all_layers) and not self.moe.ffw_dim
        and self.ffw_dim % self.moe.top_k):
      raise ValueError(f'model.ffw_dim {self.ffw_dim} is not a multiple of model.moe.top_k '
                       f'{self.moe.top_k}; give model.moe.ffw_dim')
    if not self.lora.rank and self.lora != LoRA():
      raise ValueError('model.lora is set and model.lora.rank is 0: there are no adapters; '
                       'wanted at least 1')
    if not self.layers:
      raise ValueError('the model has no layers: head, pattern x repeats and tail are all empty')
    mixers = [mixer for mixer, _ in self.all_layers]
    if 'gdn' in mixers:
      self._check_gdn()
    elif self.gdn != GDN():
      raise ValueError('model.gdn is set, but no layer has the mixer gdn; '
                       f'the layers have {sorted(set(mixers))}')
    if 'mla' in mixers:
      self._check_mla()
    elif self.mla != MLA():
      raise ValueError('model.mla is set, but no layer has the mixer mla; '
                       f'the layers have {sorted(set(mixers))}')
    ffns = {ffn for _, ffn in self.all_layers}
    local = ModelConfig.window, ModelConfig.local_theta
    if 'local' in mixers and not self.window:
      raise ValueError("model.window is 0; the mixer 'local' needs the number of tokens it sees")
    if 'local' not in mixers and (self.window, self.local_theta) != local:
      raise ValueError('model.window or model.local_theta is set, but no layer has the mixer '
                       f'local; the layers have {sorted(set(mixers))}')
    if 'moe' in ffns and self.activation != 'silu':
      raise ValueError(f'model.activation is {self.activation!r}; experts have silu')
    if 'moe' not in ffns and self.moe != MoE():
      raise ValueError('model.moe is set, but no layer has the FFN moe; '
                       f'the layers have {sorted(ffns)}')

  def _check_gdn(self):
    g, sizes = self.gdn, self.gdn_sizes
    if sizes.num_heads % sizes.num_key_heads:
      raise ValueError(f'model.gdn.num_heads {sizes.num_heads} is not a multiple of '
                       f'model.gdn.num_key_heads {sizes.num_key_heads}')
    if g.variant == 'fg2' and sizes.key_dim != sizes.value_dim:
      raise ValueError('model.gdn.variant fg2 has one gate for keys and values, so key_dim '
                       f'{sizes.key_dim} and value_dim {sizes.value_dim} must be equal; '
                       'fg2_plus has two')

  def _check_mla(self):
    if self.rope_theta and self.mla_sizes.rope_dim % 2:
      raise ValueError(f'model.mla.rope_dim is {self.mla_sizes.rope_dim}; '
                       'rotary embedding needs an even size')

  @property
  def gdn_sizes(self) -> 'GDNSizes':
    """The sizes of the mixer 'gdn', none of them 0."""
    g = self.gdn
    heads = g.num_heads or self.num_heads
    return GDNSizes(heads, g.num_key_heads or heads, g.key_dim or self.head_dim,
                    g.value_dim or self.head_dim)

  @property
  def mla_sizes(self) -> 'MLASizes':
    """The sizes of the mixer 'mla'; only rope_dim can be 0."""
    m = self.mla
    rope_dim = self.head_dim // 2 if m.rope_dim < 0 else m.rope_dim
    return MLASizes(m.kv_rank or 4 * self.head_dim, m.nope_dim or self.head_dim, rope_dim,
                    m.value_dim or self.head_dim)

  @property
  def layers(self) -> tuple[tuple[str, str], ...]:
    """Every layer as (mixer, ffn), in the order of the model; a layer's name is its index here."""
    entries = (*self.head, *(self.pattern * self.repeats), *self.tail)
    return tuple(pair(entry, self.ffn) for entry in entries)

  @property
  def mtp_layer(self) -> tuple[str, str]:
    """(mixer, ffn) of the layer in each head of multi-token prediction."""
    return tuple(self.mtp.layer) or self.layers[-1]

  @property
  def all_layers(self) -> tuple[tuple[str, str], ...]:
    """`layers`, and those of multi-token prediction behind them."""
    return self.layers + (self.mtp_layer,) * self.mtp.depth if self.layers else ()


# Fields of ModelConfig that have fields.
PARTS = {'gdn': GDN, 'mla': MLA, 'moe': MoE, 'rope': Rope, 'lora': LoRA, 'mtp': MTP}


def from_dict(fields: Mapping[str, Any]) -> ModelConfig:
  """The config of nested plain values, as JSON has them: what `dataclasses.asdict` gives."""
  def tuples(x):
    if isinstance(x, Mapping):
      return {name: tuples(value) for name, value in x.items()}
    return tuple(map(tuples, x)) if isinstance(x, list | tuple) else x

  fields = tuples(fields)
  return ModelConfig(**fields | {
      name: kind(**fields[name]) for name, kind in PARTS.items() if name in fields})


# What a run chooses without becoming another model.
RUN_FIELDS = {
    '': ('max_length', 'dtype', 'remat', 'unroll', 'attention', 'score_chunk', 'rules', 'lora'),
    'gdn': ('implementation', 'chunk'),
    'moe': ('balance_loss', 'z_loss', 'bias_rate', 'matmul', 'dispatch', 'buffer')}


def without_drops(cfg: ModelConfig) -> ModelConfig:
  """The model with room for every row, for passes that have nowhere to count drops."""
  return dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, buffer=0.0))


def architecture(cfg: ModelConfig) -> dict[str, Any]:
  """{field: value} of what makes up the function, in one form for configs that mean the same."""
  fields = dataclasses.asdict(cfg)
  mixers, ffns = ({names[i] for names in cfg.all_layers} for i in (0, 1))
  fields['layers'] = cfg.layers
  fields['mtp']['layer'] = cfg.mtp_layer if cfg.mtp.depth else ()
  fields['query_scalar'] = cfg.query_scalar or cfg.head_dim
  fields['attention_bias'] = sorted(cfg.attention_bias)
  fields['rope'] |= {'fast': cfg.rope.turns, 'gain': cfg.rope.attention_gain}
  fields['gdn'] |= cfg.gdn_sizes._asdict() | _ranks(cfg)
  fields['mla'] |= cfg.mla_sizes._asdict()
  fields['moe']['bias'] = cfg.moe.has_bias
  fields['moe']['ffw_dim'] = cfg.moe.ffw_dim or cfg.ffw_dim // cfg.moe.top_k
  unused = {'head', 'pattern', 'repeats', 'tail', 'ffn', *RUN_FIELDS['']}
  unused |= {'gdn', 'mla'} - mixers | {'moe'} - ffns
  unused |= {'ffw_dim'} if 'mlp' not in ffns else set()
  unused |= {'rope_theta'} if mixers <= {'local', 'gdn'} else set()
  if not mixers & {'attention', 'local'}:
    unused |= {'head_dim', 'num_kv_heads', 'rope_share', 'qk_norm', 'attention_bias',
               'attention_gate', 'query_scalar'}
  unused |= {f'{part}.{name}' for part in PARTS for name in RUN_FIELDS.get(part, ())}
  kept = {name: x for name, x in fields.items() if name not in unused}
  inner = {f'{part}.{name}': x for part in PARTS if part in kept
           for name, x in kept.pop(part).items()}
  return kept | {name: x for name, x in inner.items() if name not in unused}


def _ranks(cfg: ModelConfig) -> dict[str, Any]:
  """What stands for a choice in cfg.gdn, chosen as `nn/gdn.py` does."""
  g, value, plain = cfg.gdn, cfg.gdn_sizes.value_dim, cfg.gdn.variant == 'gdn'
  return {'decay_rank': 0 if plain else value if g.decay_rank < 0 else g.decay_rank,
          'beta_rank': 0 if g.variant in ('gdn', 'kda') else g.beta_rank,
          'gate_rank': (0 if plain else value) if g.gate_rank < 0 else g.gate_rank,
          'gate': g.gate or ('silu' if plain else 'sigmoid')}


class GDNSizes(NamedTuple):
  num_heads: int
  num_key_heads: int
  key_dim: int
  value_dim: int


class MLASizes(NamedTuple):
  kv_rank: int
  nope_dim: int
  rope_dim: int
  value_dim: int


def pair(layer: Layer, default_ffn: str) -> tuple[str, str]:
  """(mixer, ffn) of one entry of a stack."""
  return (layer, default_ffn) if isinstance(layer, str) else tuple(layer)
