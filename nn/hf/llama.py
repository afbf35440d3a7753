"""Decoders of attention layers: Llama 3, Qwen2.5, MiMo, Qwen3, Qwen3-MoE, Mixtral, Gemma 3 (text).

MiMo is Qwen2.5 with heads of multi-token prediction under names of their own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nn.config import ModelConfig
from nn.hf import keys as keys_lib
from nn.hf.keys import Keys
from nn.hf.table import Entry, Family

LAYER = 'model.layers.{layer}.'
MIXERS = {'full_attention': 'attention', 'sliding_attention': 'local'}


def sizes(cfg: ModelConfig) -> dict[str, int | str]:
  """Factors of the layouts below."""
  inner = cfg.moe.ffw_dim or cfg.ffw_dim // cfg.moe.top_k
  return {
      'vocab': cfg.vocab_size, 'embed': cfg.embed_dim, 'joined': 2 * cfg.embed_dim,
      'heads': cfg.num_heads, 'kv_heads': cfg.num_kv_heads, 'head_dim': cfg.head_dim,
      'ffw': cfg.ffw_dim, 'experts': cfg.moe.experts, 'inner': inner, 'gate': inner, 'up': inner}


ENDS = (
    Entry('model.embed_tokens.weight', 'embed/table', 'vocab embed -> vocab embed'),
    Entry('model.norm.weight', 'norm/scale', 'embed -> embed'),
    Entry('lm_head.weight', 'unembed/table', 'vocab embed -> vocab embed'),
)
NORMS = (
    Entry(LAYER + 'input_layernorm.weight', 'mixer_norm/scale', 'embed -> embed'),
    Entry(LAYER + 'post_attention_layernorm.weight', 'ffn_norm/scale', 'embed -> embed'),
)
NORMS_AROUND = (
    Entry(LAYER + 'input_layernorm.weight', 'mixer_norm/scale', 'embed -> embed'),
    Entry(LAYER + 'post_attention_layernorm.weight', 'mixer_post_norm/scale', 'embed -> embed'),
    Entry(LAYER + 'pre_feedforward_layernorm.weight', 'ffn_norm/scale', 'embed -> embed'),
    Entry(LAYER + 'post_feedforward_layernorm.weight', 'ffn_post_norm/scale', 'embed -> embed'),
)
ATTENTION = tuple(
    Entry(f'{LAYER}self_attn.{name}', f'mixer/{path}', layout, of=('attention', 'local'))
    for name, path, layout in (
        ('q_proj.weight', 'q', '(heads head_dim) embed -> embed heads head_dim'),
        ('k_proj.weight', 'k', '(kv_heads head_dim) embed -> embed kv_heads head_dim'),
        ('v_proj.weight', 'v', '(kv_heads head_dim) embed -> embed kv_heads head_dim'),
        ('o_proj.weight', 'o', 'embed (heads head_dim) -> heads head_dim embed'),
        ('q_proj.bias', 'q_bias', '(heads head_dim) -> heads head_dim'),
        ('k_proj.bias', 'k_bias', '(kv_heads head_dim) -> kv_heads head_dim'),
        ('v_proj.bias', 'v_bias', '(kv_heads head_dim) -> kv_heads head_dim'),
        ('o_proj.bias', 'o_bias', 'embed -> embed'),
        ('q_norm.weight', 'q_norm/scale', 'head_dim -> head_dim'),
        ('k_norm.weight', 'k_norm/scale', 'head_dim -> head_dim')))
MLP = (
    Entry(LAYER + 'mlp.gate_proj.weight', 'ffn/gate', 'ffw embed -> embed ffw', of=('mlp',)),
    Entry(LAYER + 'mlp.up_proj.weight', 'ffn/up', 'ffw embed -> embed ffw', of=('mlp',)),
    Entry(LAYER + 'mlp.down_proj.weight', 'ffn/down', 'embed ffw -> ffw embed', of=('mlp',)),
)
ROUTER = 'experts embed -> embed experts'


def experts(place: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
  """The three matrices of every expert, as tensors of their own. place: below the layer's name."""
  name = lambda matrix: f'{LAYER}{place}.{{expert}}.{matrix}.weight'
  return (Entry(name(gate), 'ffn/gate', 'inner embed -> embed inner', of=('moe',)),
          Entry(name(up), 'ffn/up', 'inner embed -> embed inner', of=('moe',)),
          Entry(name(down), 'ffn/down', 'embed inner -> inner embed', of=('moe',)))


QWEN_EXPERTS = (
    Entry(LAYER + 'mlp.gate.weight', 'ffn/router', ROUTER, of=('moe',)),
    *experts('mlp.experts', 'gate_proj', 'up_proj', 'down_proj'),
)
MIXTRAL_EXPERTS = (
    Entry(LAYER + 'block_sparse_moe.gate.weight', 'ffn/router', ROUTER, of=('moe',)),
    *experts('block_sparse_moe.experts', 'w1', 'w3', 'w2'),
)
# As modules of transformers 5 have them: all experts of a layer in one tensor.
FUSED = (
    Entry(LAYER + 'mlp.gate.weight', 'ffn/router', ROUTER, of=('moe',)),
    Entry(LAYER + 'mlp.experts.gate_up_proj', 'ffn/gate',
          'experts gate+up embed -> experts embed gate', 'gate', of=('moe',)),
    Entry(LAYER + 'mlp.experts.gate_up_proj', 'ffn/up',
          'experts gate+up embed -> experts embed up', 'up', of=('moe',)),
    Entry(LAYER + 'mlp.experts.down_proj', 'ffn/down',
          'experts embed inner -> experts inner embed', of=('moe',)),
)
MTP = 'model.mtp_layers.'


def head(*names: str) -> tuple[Entry, ...]:
  """What a head has beside a layer: norms of embedding and hidden state, projection, last norm."""
  layouts = {'embedding_norm/scale': 'embed -> embed', 'hidden_norm/scale': 'embed -> embed',
             'project': 'embed joined -> joined embed', 'norm/scale': 'embed -> embed'}
  return tuple(Entry(f'{LAYER}{name}.weight', path, layout)
               for name, (path, layout) in zip(names, layouts.items()))


MIMO_HEAD = head('token_layernorm', 'hidden_layernorm', 'input_proj', 'final_layernorm')


def of_heads(entries: tuple[Entry, ...], place: str = LAYER) -> tuple[Entry, ...]:
  """The same tensors of the layer in a head of multi-token prediction. place: for LAYER."""
  return tuple(dataclasses.replace(
      e, name=e.name.replace(LAYER, place), path=f'mtp/{{head}}/{e.path}') for e in entries)


def read_bias(keys: Keys) -> tuple[str, ...]:
  return ('q', 'k', 'v', 'o') if keys('attention_bias', False) else ()


def write_bias(cfg: ModelConfig) -> dict[str, bool]:
  return {'attention_bias': bool(cfg.attention_bias)}


def with_layers(
    fields: dict[str, Any], mixers: list[str], ffns: list[str], window: int = 0,
) -> dict[str, Any]:
  """The fields with those of a stack; layers with a window turn as the others do."""
  if 'local' in mixers:
    if fields['rope']:
      raise ValueError(f'config.json: rope_type {fields["rope"]["kind"]!r} in layers with a window '
                       'has no form here')
    fields = fields | {'window': window, 'local_theta': fields['rope_theta']}
  return fields | keys_lib.stack(list(zip(mixers, ffns, strict=True)))


def read_window(keys: Keys) -> int | None:
  """Qwen's sliding_window, which counts only with use_sliding_window."""
  window = keys('sliding_window', None)
  return window if keys('use_sliding_window', False) else None


def layer_types(
    keys: Keys, assumed: list[str], mixers: Mapping[str, str] = MIXERS,
) -> list[str]:
  """The mixer of every layer. assumed: types where config.json lists none."""
  types = keys('layer_types', assumed)
  if unknown := set(types) - set(mixers):
    raise ValueError(f'config.json: layer_types has {sorted(unknown)}; known are {sorted(mixers)}')
  if len(types) != keys('num_hidden_layers'):
    raise ValueError(
        f'config.json: {len(types)} layer_types for {keys("num_hidden_layers")} layers')
  return [mixers[t] for t in types]


def write_types(cfg: ModelConfig, mixers: Mapping[str, str] = MIXERS) -> list[str]:
  names = {mixer: t for t, mixer in mixers.items()}
  return [names.get(mixer, mixer) for mixer, _ in cfg.layers]


def read_llama(keys: Keys) -> dict[str, Any]:
  keys.expect('hidden_act', 'silu')
  count = keys('num_hidden_layers')
  fields = keys_lib.read_sizes(keys) | keys_lib.read_rope(keys) | {
      'attention_bias': read_bias(keys)}
  return with_layers(fields, ['attention'] * count, ['mlp'] * count)


def write_llama(cfg: ModelConfig) -> dict[str, Any]:
  return keys_lib.write_sizes(cfg) | write_bias(cfg) | {
      'hidden_act': 'silu', 'mlp_bias': False, 'rope_parameters': keys_lib.write_rope(cfg)}


def read_qwen(keys: Keys) -> dict[str, Any]:
  """What Qwen2.5 and Qwen3 have in common."""
  keys.expect('hidden_act', 'silu')
  fields = keys_lib.read_sizes(keys) | keys_lib.read_rope(keys)
  window, count = read_window(keys), keys('num_hidden_layers')
  full = keys('max_window_layers', count) if window else count
  mixers = layer_types(
      keys, ['sliding_attention' if i >= full else 'full_attention' for i in range(count)])
  if 'local' in mixers and not window:
    raise ValueError('config.json: layer_types has sliding_attention, without use_sliding_window '
                     'and sliding_window')
  return with_layers(fields, mixers, ['mlp'] * count, window)


def write_qwen(cfg: ModelConfig) -> dict[str, Any]:
  return keys_lib.write_sizes(cfg) | {
      'hidden_act': 'silu', 'layer_types': write_types(cfg), 'use_sliding_window': cfg.window > 0,
      'sliding_window': cfg.window or None, 'rope_parameters': keys_lib.write_rope(cfg)}


def read_qwen2(keys: Keys) -> dict[str, Any]:
  return read_qwen(keys) | {'attention_bias': ('q', 'k', 'v')}


def read_mimo(keys: Keys) -> dict[str, Any]:
  keys.expect('attention_bias', True)
  depth = keys.depth('num_nextn_predict_layers', 0)
  return read_qwen2(keys) | keys_lib.read_mtp(
      depth, 'attention', 'mlp', ('hidden', 'embedding'))


def write_mimo(cfg: ModelConfig) -> dict[str, Any]:
  return write_qwen(cfg) | {'attention_bias': True, 'num_nextn_predict_layers': cfg.mtp.depth}


def read_qwen3(keys: Keys) -> dict[str, Any]:
  return read_qwen(keys) | {'attention_bias': read_bias(keys), 'qk_norm': True}


def write_qwen3(cfg: ModelConfig) -> dict[str, Any]:
  return write_qwen(cfg) | write_bias(cfg)


def read_experts(keys: Keys, width: int) -> dict[str, Any]:
  count = keys('num_local_experts', None) or keys('num_experts')
  return {'experts': count, 'top_k': keys('num_experts_per_tok'), 'ffw_dim': width,
          'scores': 'softmax'}


def read_all_or_none(fields: dict, window: int | None, ffns: list[str]) -> dict[str, Any]:
  """The fields of a stack whose layers all have the window, if there is one."""
  return with_layers(fields, ['local' if window else 'attention'] * len(ffns), ffns, window or 0)


def write_window(cfg: ModelConfig) -> dict[str, Any]:
  """sliding_window of such a stack, and the angles, which are then those of its layers."""
  rope = keys_lib.write_rope(cfg)
  if all(mixer == 'local' for mixer, _ in cfg.layers):
    rope['rope_theta'] = cfg.local_theta
  return {'sliding_window': cfg.window or None, 'rope_parameters': rope}


def read_sparse(keys: Keys) -> list[str]:
  """The FFN of every layer."""
  dense, step = set(keys('mlp_only_layers', [])), keys('decoder_sparse_step')
  return ['mlp' if i in dense or (i + 1) % step else 'moe'
          for i in range(keys('num_hidden_layers'))]


def write_sparse(cfg: ModelConfig) -> dict[str, Any]:
  dense = [i for i, (_, ffn) in enumerate(cfg.layers) if ffn == 'mlp']
  return {'decoder_sparse_step': 1, 'mlp_only_layers': dense}


def read_qwen3_moe(keys: Keys) -> dict[str, Any]:
  keys.expect('hidden_act', 'silu')
  ffns = read_sparse(keys)
  moe = read_experts(keys, keys('moe_intermediate_size')) | {'renormalise': keys('norm_topk_prob')}
  fields = keys_lib.read_sizes(keys) | keys_lib.read_rope(keys) | {
      'attention_bias': read_bias(keys), 'qk_norm': True, 'moe': moe}
  return read_all_or_none(fields, read_window(keys), ffns)


def write_qwen3_moe(cfg: ModelConfig) -> dict[str, Any]:
  return keys_lib.write_sizes(cfg) | write_bias(cfg) | write_window(cfg) | write_sparse(cfg) | {
      'hidden_act': 'silu', 'use_sliding_window': cfg.window > 0, 'num_experts': cfg.moe.experts,
      'num_experts_per_tok': cfg.moe.top_k, 'norm_topk_prob': cfg.moe.renormalise,
      'moe_intermediate_size': sizes(cfg)['inner']}


def read_mixtral(keys: Keys) -> dict[str, Any]:
  keys.expect('hidden_act', 'silu')
  fields = keys_lib.read_sizes(keys) | keys_lib.read_rope(keys) | {
      'moe': read_experts(keys, keys('intermediate_size')) | {'renormalise': True}}
  return read_all_or_none(
      fields, keys('sliding_window', None), ['moe'] * keys('num_hidden_layers'))


def write_mixtral(cfg: ModelConfig) -> dict[str, Any]:
  return keys_lib.write_sizes(cfg) | write_window(cfg) | {
      'hidden_act': 'silu', 'intermediate_size': sizes(cfg)['inner'],
      'num_local_experts': cfg.moe.experts, 'num_experts_per_tok': cfg.moe.top_k}


def read_gemma3(keys: Keys) -> dict[str, Any]:
  count, ropes = keys('num_hidden_layers'), keys('rope_parameters', {})
  keys.expect('hidden_activation', 'gelu_pytorch_tanh')
  period = keys('sliding_window_pattern', None) or keys('_sliding_window_pattern', 6)
  mixers = layer_types(
      keys, ['sliding_attention' if (i + 1) % period else 'full_attention' for i in range(count)])
  local = {'rope_theta': keys('rope_local_base_freq')} | (ropes.get('sliding_attention') or {})
  local = keys_lib.rope_fields(local, 0, False)
  if local['rope']:
    raise ValueError(f'config.json: rope_type {local["rope"]["kind"]!r} in layers with a window '
                     'has no form here')
  fields = keys_lib.read_sizes(keys) | keys_lib.read_rope(keys, kind='full_attention') | {
      'attention_bias': read_bias(keys), 'qk_norm': True, 'unit_offset': True, 'post_norms': True,
      'activation': 'gelu_tanh', 'scale_embed': True,
      'query_scalar': keys('query_pre_attn_scalar')}
  if 'local' in mixers:
    fields |= {'window': keys('sliding_window'), 'local_theta': local['rope_theta']}
  return fields | keys_lib.stack([(mixer, 'mlp') for mixer in mixers])


def write_gemma3(cfg: ModelConfig) -> dict[str, Any]:
  return keys_lib.write_sizes(cfg) | write_bias(cfg) | {
      'hidden_activation': 'gelu_pytorch_tanh', 'layer_types': write_types(cfg),
      'sliding_window': cfg.window or None,
      'query_pre_attn_scalar': cfg.query_scalar or cfg.head_dim,
      'rope_parameters': {
          'full_attention': keys_lib.write_rope(cfg),
          'sliding_attention': {'rope_type': 'default', 'rope_theta': cfg.local_theta}}}


def family(
    model_type: str, architecture: str, entries, read, write, fused=(), heads='',
    **defaults) -> Family:
  common: Mapping[str, Any] = {'tie_word_embeddings': False, 'rope_theta': 10_000.0}
  return Family(model_type=model_type, architecture=architecture, entries=entries, sizes=sizes,
                read=read, write=write, fused=fused, heads=heads, defaults={**common, **defaults})


LLAMA = family('llama', 'LlamaForCausalLM', ENDS + NORMS + ATTENTION + MLP, read_llama, write_llama)
QWEN2 = family('qwen2', 'Qwen2ForCausalLM', ENDS + NORMS + ATTENTION + MLP, read_qwen2, write_qwen)
MIMO = family(
    'mimo', 'MiMoForCausalLM', QWEN2.entries + of_heads(
        NORMS + ATTENTION + MLP + MIMO_HEAD, MTP + '{head}.'), read_mimo, write_mimo, heads=MTP,
    attention_bias=True)
QWEN3 = family('qwen3', 'Qwen3ForCausalLM', ENDS + NORMS + ATTENTION + MLP, read_qwen3, write_qwen3,
               head_dim=128)
QWEN3_MOE = family(
    'qwen3_moe', 'Qwen3MoeForCausalLM', ENDS + NORMS + ATTENTION + MLP + QWEN_EXPERTS,
    read_qwen3_moe, write_qwen3_moe, FUSED, norm_topk_prob=False, decoder_sparse_step=1)
MIXTRAL = family(
    'mixtral', 'MixtralForCausalLM', ENDS + NORMS + ATTENTION + MIXTRAL_EXPERTS, read_mixtral,
    write_mixtral, FUSED, rope_theta=1_000_000.0)
GEMMA3 = family(
    'gemma3_text', 'Gemma3ForCausalLM', ENDS + NORMS_AROUND + ATTENTION + MLP, read_gemma3,
    write_gemma3, tie_word_embeddings=True, rope_theta=1_000_000.0, rope_local_base_freq=10_000.0,
    head_dim=256, query_pre_attn_scalar=256, sliding_window=4096,
    hidden_activation='gelu_pytorch_tanh')
