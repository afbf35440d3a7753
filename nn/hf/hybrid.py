"""Stacks with linear attention: Qwen3-Next, Qwen3.5 (text), dense and with experts, Kimi-Linear.

Qwen's head of multi-token prediction is a layer with full attention, under names of its own.
"""

import dataclasses
from typing import Any

from nn.config import ModelConfig
from nn.hf import keys as keys_lib
from nn.hf import latent, llama
from nn.hf.keys import Keys
from nn.hf.llama import LAYER
from nn.hf.table import Entry, Family

MIXERS = {'full_attention': 'attention', 'linear_attention': 'gdn'}
LINEAR = LAYER + 'linear_attn.'

# A head's gate lies behind its query.
GATED = tuple(
    Entry(f'{LAYER}self_attn.q_proj.{kind}', f'mixer/{path}', layout, part, of=('attention',))
    for part, name in (('query', 'q'), ('out_gate', 'gate'))
    for kind, path, layout in (
        ('weight', name, '(heads query+out_gate) embed -> embed heads head_dim'),
        ('bias', f'{name}_bias', '(heads query+out_gate) -> heads head_dim')))
GATED_ATTENTION = GATED + tuple(e for e in llama.ATTENTION if '.q_proj.' not in e.name)
GDN = tuple(
    Entry(LINEAR + name, f'mixer/{path}', layout, part, of=('gdn',))
    for name, path, layout, part in (
        *(('conv1d.weight', f'{name}_conv', f'queries+keys+values 1 conv -> conv {out}', part)
          for name, part, out in (('q', 'queries', 'groups key'), ('k', 'keys', 'groups key'),
                                  ('v', 'values', '(groups ratio) value'))),
        ('A_log', 'decay_log', '(groups ratio) -> (groups ratio)', ''),
        ('dt_bias', 'decay_bias', '(groups ratio) -> (groups ratio)', ''),
        ('norm.weight', 'norm', 'value -> value', ''),
        ('out_proj.weight', 'o', 'embed (groups ratio value) -> (groups ratio) value embed', '')))
# All that belongs to a key head lies together: its query, key, values and output gates.
GDN_BY_GROUP = tuple(
    Entry(LINEAR + name, f'mixer/{path}', f'(groups {parts}) embed -> embed {out}', part,
          of=('gdn',))
    for name, parts, rows in (
        ('in_proj_qkvz.weight', 'q+k+v+z', (
            ('q', 'q', 'groups key'), ('k', 'k', 'groups key'), ('v', 'v', '(groups ratio) value'),
            ('z', 'gate', '(groups ratio) value'))),
        ('in_proj_ba.weight', 'b+a', (
            ('b', 'beta', '(groups ratio)'), ('a', 'decay', '(groups ratio)'))))
    for part, path, out in rows)
GDN_APART = tuple(
    Entry(LINEAR + name, f'mixer/{path}', f'{theirs} embed -> embed {ours}', part, of=('gdn',))
    for name, path, theirs, ours, part in (
        ('in_proj_qkv.weight', 'q', 'queries+keys+values', 'groups key', 'queries'),
        ('in_proj_qkv.weight', 'k', 'queries+keys+values', 'groups key', 'keys'),
        ('in_proj_qkv.weight', 'v', 'queries+keys+values', '(groups ratio) value', 'values'),
        ('in_proj_z.weight', 'gate', '(groups ratio value)', '(groups ratio) value', ''),
        ('in_proj_b.weight', 'beta', '(groups ratio)', '(groups ratio)', ''),
        ('in_proj_a.weight', 'decay', '(groups ratio)', '(groups ratio)', '')))
QWEN_EXPERTS = (
    *llama.QWEN_EXPERTS, *latent.shared('mlp.shared_expert'),
    Entry(LAYER + 'mlp.shared_expert_gate.weight', 'ffn/shared_gate', '1 embed -> embed',
          of=('moe',)),
)
MTP = 'mtp.layers.0.'
HEAD = tuple(
    Entry('mtp.' + name, f'mtp/{{head}}/{path}', layout)
    for name, path, layout in (
        ('pre_fc_norm_embedding.weight', 'embedding_norm/scale', 'embed -> embed'),
        ('pre_fc_norm_hidden.weight', 'hidden_norm/scale', 'embed -> embed'),
        ('fc.weight', 'project', 'embed joined -> joined embed'),
        ('norm.weight', 'norm/scale', 'embed -> embed')))
KDA = tuple(
    Entry(f'{LAYER}self_attn.{name}', f'mixer/{path}', layout, of=('gdn',))
    for name, path, layout in (
        *((f'{s}_proj.weight', s, '(groups key) embed -> embed groups key') for s in 'qk'),
        ('v_proj.weight', 'v', '(groups value) embed -> embed groups value'),
        *((f'{s}_conv1d.weight', f'{s}_conv', '(groups key) 1 conv -> conv groups key')
          for s in 'qk'),
        ('v_conv1d.weight', 'v_conv', '(groups value) 1 conv -> conv groups value'),
        ('f_a_proj.weight', 'decay_down', 'rank embed -> embed rank'),
        ('f_b_proj.weight', 'decay_up', '(groups key) rank -> rank groups key'),
        ('dt_bias', 'decay_bias', '(groups key) -> groups key'),
        ('A_log', 'decay_log', '1 1 groups 1 -> groups'),
        ('b_proj.weight', 'beta', 'groups embed -> embed groups'),
        ('g_a_proj.weight', 'gate_down', 'rank embed -> embed rank'),
        ('g_b_proj.weight', 'gate_up', '(groups value) rank -> rank groups value'),
        ('o_norm.weight', 'norm', 'value -> value'),
        ('o_proj.weight', 'o', 'embed (groups value) -> groups value embed')))
SPARSE = 'block_sparse_moe'
KIMI_EXPERTS = (
    Entry(f'{LAYER}{SPARSE}.gate.weight', 'ffn/router', llama.ROUTER, of=('moe',)),
    *llama.experts(f'{SPARSE}.experts', 'w1', 'w3', 'w2'),
    latent.bias(SPARSE), *latent.shared(f'{SPARSE}.shared_experts'),
)

# The dense layers' as transformers saves them; the published files have llama.MLP.
KIMI_DENSE = tuple(
    Entry(e.name.replace('mlp', SPARSE), e.path, e.layout, of=e.of) for e in llama.MLP)
KIMI_MIXERS = {'full_attention': 'mla', 'linear_attention': 'gdn'}
FFNS = {'dense': 'mlp', 'sparse': 'moe'}
KIMI_ALWAYS = {'attention_bias': False, 'mla_use_nope': True, 'moe_layer_freq': 1,
               'moe_router_activation_func': 'sigmoid', 'use_grouped_topk': True}


def inside(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
  """The names that the text part's tensors have in a model that sees."""
  return tuple(dataclasses.replace(e, name=e.name.replace('model.', 'model.language_model.', 1))
               for e in entries if e.name.startswith('model.'))


def sizes(cfg: ModelConfig) -> dict[str, int | str]:
  """Factors of the layouts above. groups: key heads; ratio: value heads of each."""
  heads, groups, key, value = cfg.gdn_sizes
  return latent.sizes(cfg) | {
      'query': 'head_dim', 'out_gate': 'head_dim', 'groups': groups, 'ratio': heads // groups,
      'key': key, 'value': value, 'conv': cfg.gdn.conv, 'rank': value,
      'queries': 'groups key', 'keys': 'groups key', 'values': 'groups ratio value',
      'q': 'key', 'k': 'key', 'v': 'ratio value', 'z': 'ratio value', 'b': 'ratio', 'a': 'ratio'}


def read_head(keys: Keys, ffn: str) -> dict[str, Any]:
  """Qwen's head, one where config.json counts none, as other engines assume."""
  depth = keys.depth('mtp_num_hidden_layers', 1)
  if depth > 1:
    raise ValueError(f'config.json: mtp_num_hidden_layers is {depth}; known is 0 or 1: several '
                     'share one projection')
  if keys('mtp_use_dedicated_embeddings', False) and depth:
    raise ValueError('config.json: mtp_use_dedicated_embeddings is True; known is False')
  return keys_lib.read_mtp(depth, 'attention', ffn)


def read_qwen(keys: Keys, ffns: list[str]) -> dict[str, Any]:
  """What Qwen3-Next and Qwen3.5 have in common. ffns: of the layers."""
  keys.expect('hidden_act', 'silu')
  keys.expect('attn_output_gate', True)
  keys('mamba_ssm_dtype', None)        # of other engines' states
  interval = keys('full_attention_interval', 4)
  mixers = llama.layer_types(keys, [
      'linear_attention' if (i + 1) % interval else 'full_attention'
      for i in range(len(ffns))], MIXERS)
  fields = keys_lib.read_sizes(keys) | keys_lib.read_rope(
      keys, partial=True, ignored=('mrope_section', 'mrope_interleaved')) | {
      'qk_norm': True, 'unit_offset': True, 'attention_gate': True,
      'attention_bias': ('q', 'k', 'v', 'gate', 'o') if keys('attention_bias') else ()}
  gdn = {
      'variant': 'gdn', 'num_heads': keys('linear_num_value_heads'),
      'num_key_heads': keys('linear_num_key_heads'), 'key_dim': keys('linear_key_head_dim'),
      'value_dim': keys('linear_value_head_dim'), 'conv': keys('linear_conv_kernel_dim'),
      'norm_eps': fields['norm_eps']}
  return fields | keys_lib.stack(list(zip(mixers, ffns, strict=True))) | read_head(
      keys, 'moe' if 'moe' in ffns else 'mlp') | ({'gdn': gdn} if 'gdn' in mixers else {})


def write_qwen(cfg: ModelConfig) -> dict[str, Any]:
  heads, groups, key, value = cfg.gdn_sizes
  return keys_lib.write_sizes(cfg) | llama.write_bias(cfg) | {
      'hidden_act': 'silu', 'layer_types': llama.write_types(cfg, MIXERS),
      'linear_num_value_heads': heads,
      'linear_num_key_heads': groups, 'linear_key_head_dim': key, 'linear_value_head_dim': value,
      'linear_conv_kernel_dim': cfg.gdn.conv,
      'rope_parameters': keys_lib.write_rope(cfg, partial=True)}


def read_experts(keys: Keys) -> dict[str, Any]:
  return llama.read_experts(keys, keys('moe_intermediate_size')) | {
      'shared_dim': keys('shared_expert_intermediate_size'), 'shared_gate': True}


def write_experts(cfg: ModelConfig) -> dict[str, Any]:
  return {'num_experts': cfg.moe.experts, 'num_experts_per_tok': cfg.moe.top_k,
          'moe_intermediate_size': sizes(cfg)['inner'],
          'shared_expert_intermediate_size': cfg.moe.shared_dim}


def read_qwen3_next(keys: Keys) -> dict[str, Any]:
  ffns = llama.read_sparse(keys)
  moe = read_experts(keys) | {'renormalise': keys('norm_topk_prob')}
  return read_qwen(keys, ffns) | ({'moe': moe} if 'moe' in ffns else {})


def write_qwen3_next(cfg: ModelConfig) -> dict[str, Any]:
  return write_qwen(cfg) | write_experts(cfg) | llama.write_sparse(cfg) | {
      'norm_topk_prob': cfg.moe.renormalise}


def read_qwen3_5(keys: Keys) -> dict[str, Any]:
  return read_qwen(keys, ['mlp'] * keys('num_hidden_layers'))


def write_qwen3_5(cfg: ModelConfig) -> dict[str, Any]:
  return write_qwen(cfg) | {'mtp_num_hidden_layers': cfg.mtp.depth}


def read_qwen3_5_moe(keys: Keys) -> dict[str, Any]:
  fields = read_qwen(keys, ['moe'] * keys('num_hidden_layers'))
  return fields | {'moe': read_experts(keys) | {'renormalise': True}}


def write_qwen3_5_moe(cfg: ModelConfig) -> dict[str, Any]:
  out = write_qwen3_5(cfg) | write_experts(cfg)
  del out['intermediate_size']
  return out


def read_kimi_layers(keys: Keys) -> tuple[list[str], list[str]]:
  """Mixers and FFNs; where layer_types is not, linear_attn_config counts layers from 1."""
  count, linear = keys('num_hidden_layers'), keys('linear_attn_config', {})
  kinds = {'kda_layers': 'linear_attention', 'full_attn_layers': 'full_attention'}
  listed = {i: kind for name, kind in kinds.items() for i in linear.get(name, ())}
  if listed and sorted(listed) != list(range(1, count + 1)):
    raise ValueError(f'config.json: linear_attn_config names {len(listed)} layers of {count}: '
                     f'{sorted(listed)}')
  assumed = [listed[i + 1] if listed else 'linear_attention' if i % 4 or not i else 'full_attention'
             for i in range(count)]
  dense = keys('first_k_dense_replace', 1)
  types = keys('mlp_layer_types', ['dense' if i < dense else 'sparse' for i in range(count)])
  if set(types) - set(FFNS) or len(types) != count:
    raise ValueError(f'config.json: mlp_layer_types is {types}, wanted {count} of {list(FFNS)}')
  return llama.layer_types(keys, assumed, KIMI_MIXERS), [FFNS[t] for t in types]


def read_kimi(keys: Keys) -> dict[str, Any]:
  keys.expect('hidden_act', 'silu')
  for name, only in KIMI_ALWAYS.items():
    keys.expect(name, only)
  for name in ('rope_theta', 'qk_head_dim', 'num_nextn_predict_layers'):
    keys(name, None)                   # nothing is turned; no heads of multi-token prediction
  mixers, ffns = read_kimi_layers(keys)
  mla, linear = latent.read_mla(keys), keys('linear_attn_config', {})
  sizes = keys_lib.read_sizes(keys, 'model_max_length') | {'head_dim': mla['rope_dim']}
  heads, dim, conv = (linear.get(old, keys(new)) for old, new in (
      ('num_heads', 'linear_num_heads'), ('head_dim', 'linear_head_dim'),
      ('short_conv_kernel_size', 'linear_conv_kernel_dim')))
  width = keys('moe_intermediate_size')
  parts = {
      'mla': mla,
      'gdn': {'variant': 'kda', 'num_heads': heads, 'num_key_heads': heads, 'key_dim': dim,
              'value_dim': dim, 'conv': conv, 'norm_eps': sizes['norm_eps']},
      'moe': {'experts': keys('num_experts'), 'top_k': keys('num_experts_per_token'),
              'ffw_dim': width, 'scores': 'sigmoid', 'bias': True,
              'renormalise': keys('moe_renormalize'),
              'scale': float(keys('routed_scaling_factor')), 'groups': keys('num_expert_group'),
              'top_groups': keys('topk_group'), 'shared_dim': width * keys('num_shared_experts')}}
  kinds = {*mixers, *ffns}
  return sizes | keys_lib.stack(list(zip(mixers, ffns, strict=True))) | {
      'rope_theta': 0.0, **{name: part for name, part in parts.items() if name in kinds}}


def write_kimi(cfg: ModelConfig) -> dict[str, Any]:
  """Layers, heads and their size twice: as transformers writes them, and as published."""
  heads, _, dim, _ = cfg.gdn_sizes
  width, ffns = llama.sizes(cfg)['inner'], [ffn for _, ffn in cfg.layers]
  of = lambda mixer: [i + 1 for i, (m, _) in enumerate(cfg.layers) if m == mixer]
  out = keys_lib.write_sizes(cfg) | latent.write_mla(cfg) | KIMI_ALWAYS | {
      'hidden_act': 'silu', 'model_max_length': cfg.max_length, 'head_dim': cfg.mla_sizes.rope_dim,
      'layer_types': llama.write_types(cfg, KIMI_MIXERS),
      'mlp_layer_types': ['sparse' if ffn == 'moe' else 'dense' for ffn in ffns],
      'first_k_dense_replace': [*ffns, 'moe'].index('moe'),
      'linear_num_heads': heads, 'linear_head_dim': dim, 'linear_conv_kernel_dim': cfg.gdn.conv,
      'linear_attn_config': {
          'kda_layers': of('gdn'), 'full_attn_layers': of('mla'), 'num_heads': heads,
          'head_dim': dim, 'short_conv_kernel_size': cfg.gdn.conv},
      'moe_intermediate_size': width, 'num_experts': cfg.moe.experts,
      'num_experts_per_token': cfg.moe.top_k, 'moe_renormalize': cfg.moe.renormalise,
      'routed_scaling_factor': cfg.moe.scale, 'num_expert_group': cfg.moe.groups,
      'topk_group': cfg.moe.top_groups, 'num_shared_experts': cfg.moe.shared_dim // width}
  del out['max_position_embeddings']
  return out


COMMON = {
    'attn_output_gate': True, 'tie_word_embeddings': False, 'rope_theta': 10_000.0,
    'attention_bias': False,
    'partial_rotary_factor': 0.25, 'norm_topk_prob': True, 'decoder_sparse_step': 1,
    'linear_conv_kernel_dim': 4, 'head_dim': 256}
ALL = llama.ENDS + llama.NORMS + GATED_ATTENTION + GDN
FUSED = llama.FUSED + llama.of_heads(llama.FUSED, MTP)


def with_head(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
  """A model's entries and those of its head."""
  layer = tuple(e for e in entries if e.name.startswith(LAYER) and 'gdn' not in e.of)
  return entries + llama.of_heads(layer, MTP) + HEAD


QWEN3_NEXT = Family(
    model_type='qwen3_next', architecture='Qwen3NextForCausalLM', sizes=sizes,
    entries=with_head(ALL + GDN_BY_GROUP + llama.MLP + QWEN_EXPERTS), fused=FUSED, heads='mtp.',
    read=read_qwen3_next, write=write_qwen3_next, defaults=COMMON)
DENSE = ALL + GDN_APART + llama.MLP
SPARSE_ONLY = ALL + GDN_APART + QWEN_EXPERTS
QWEN3_5 = Family(
    model_type='qwen3_5_text', architecture='Qwen3_5ForCausalLM', sizes=sizes,
    entries=with_head(DENSE), fused=inside(DENSE), heads='mtp.', read=read_qwen3_5,
    write=write_qwen3_5, defaults=COMMON)
QWEN3_5_MOE = Family(
    model_type='qwen3_5_moe_text', architecture='Qwen3_5MoeForCausalLM', sizes=sizes,
    entries=with_head(SPARSE_ONLY), fused=FUSED + inside(SPARSE_ONLY + llama.FUSED), heads='mtp.',
    read=read_qwen3_5_moe, write=write_qwen3_5_moe,
    defaults=COMMON | {'intermediate_size': 1})    # of the dense layers that there are not
# Models that see, of which only the text is read: tensors of the rest are to be dropped.
WITH_TEXT = {'qwen3_5': QWEN3_5, 'qwen3_5_moe': QWEN3_5_MOE}
KIMI_LINEAR = Family(
    model_type='kimi_linear', architecture='KimiLinearForCausalLM', sizes=sizes,
    entries=llama.ENDS + llama.NORMS + latent.MLA + KDA + llama.MLP + KIMI_EXPERTS,
    fused=KIMI_DENSE + llama.FUSED, read=read_kimi, write=write_kimi,
    defaults=KIMI_ALWAYS | {
        'tie_word_embeddings': False, 'moe_renormalize': True, 'num_expert_group': 1,
        'topk_group': 1, 'num_shared_experts': 1, 'linear_num_heads': 32, 'linear_head_dim': 128,
        'linear_conv_kernel_dim': 4})
