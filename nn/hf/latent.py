"""DeepSeek-V3 and GLM-4.5: dense layers, then experts chosen by sigmoids with a selection bias.

Heads of multi-token prediction are layers behind the last, with more tensors than the others.
"""

from typing import Any

from nn.config import ModelConfig
from nn.hf import keys as keys_lib
from nn.hf import llama
from nn.hf.keys import Keys
from nn.hf.llama import LAYER
from nn.hf.table import Entry, Family

MLA = tuple(
    Entry(f'{LAYER}self_attn.{name}', f'mixer/{path}', layout, part, of=('mla',))
    for name, path, layout, part in (
        ('q_proj.weight', 'q', '(heads key_dim) embed -> embed heads key_dim', ''),
        ('q_a_proj.weight', 'q_down', 'q_rank embed -> embed q_rank', ''),
        ('q_a_layernorm.weight', 'q_norm', 'q_rank -> q_rank', ''),
        ('q_b_proj.weight', 'q_up', '(heads key_dim) q_rank -> q_rank heads key_dim', ''),
        ('kv_a_proj_with_mqa.weight', 'kv_down',
         'kv_rank+rope_dim embed -> embed kv_rank', 'kv_rank'),
        ('kv_a_proj_with_mqa.weight', 'k_shared',
         'kv_rank+rope_dim embed -> embed rope_dim', 'rope_dim'),
        ('kv_a_layernorm.weight', 'kv_norm', 'kv_rank -> kv_rank', ''),
        ('kv_b_proj.weight', 'k_up',
         '(heads nope_dim+value_dim) kv_rank -> kv_rank heads nope_dim', 'nope_dim'),
        ('kv_b_proj.weight', 'v_up',
         '(heads nope_dim+value_dim) kv_rank -> kv_rank heads value_dim', 'value_dim'),
        ('o_proj.weight', 'o', 'embed (heads value_dim) -> heads value_dim embed', '')))


def shared(place: str) -> tuple[Entry, ...]:
  """The expert that every token goes through. place: below the layer's name."""
  return tuple(
      Entry(f'{LAYER}{place}.{name}.weight', f'ffn/shared/{path}', layout, of=('moe',))
      for name, path, layout in (
          ('gate_proj', 'gate', 'shared embed -> embed shared'),
          ('up_proj', 'up', 'shared embed -> embed shared'),
          ('down_proj', 'down', 'embed shared -> shared embed')))


def bias(place: str) -> Entry:
  """The router's, which only chooses."""
  return Entry(
      f'{LAYER}{place}.gate.e_score_correction_bias', 'ffn/bias', 'experts -> experts', of=('moe',))


ALWAYS = {'scoring_func': 'sigmoid', 'topk_method': 'noaux_tc', 'moe_layer_freq': 1}
EXPERTS = (*llama.QWEN_EXPERTS, bias('mlp'), *shared('mlp.shared_experts'))


def sizes(cfg: ModelConfig) -> dict[str, int | str]:
  """Factors of the layouts above."""
  m = cfg.mla_sizes
  return llama.sizes(cfg) | m._asdict() | {
      'key_dim': m.nope_dim + m.rope_dim, 'q_rank': cfg.mla.q_rank, 'shared': cfg.moe.shared_dim}


# What a head has beside a layer. Copies of the two tables lie beside these.
HEAD = llama.head('enorm', 'hnorm', 'eh_proj', 'shared_head.norm')
COPIES = (
    Entry(LAYER + 'embed_tokens.weight', 'embed/table', 'vocab embed -> vocab embed'),
    Entry(LAYER + 'shared_head.head.weight', 'unembed/table', 'vocab embed -> vocab embed'))


def read_mla(keys: Keys) -> dict[str, Any]:
  return {'q_rank': keys('q_lora_rank', 0), 'kv_rank': keys('kv_lora_rank'),
          'nope_dim': keys('qk_nope_head_dim'), 'rope_dim': keys('qk_rope_head_dim'),
          'value_dim': keys('v_head_dim')}


def write_mla(cfg: ModelConfig) -> dict[str, Any]:
  m = cfg.mla_sizes
  return {'q_lora_rank': cfg.mla.q_rank or None, 'kv_lora_rank': m.kv_rank,
          'qk_nope_head_dim': m.nope_dim, 'qk_rope_head_dim': m.rope_dim,
          'v_head_dim': m.value_dim, 'num_key_value_heads': cfg.num_heads}


def read_sigmoid(keys: Keys) -> dict[str, Any]:
  """The experts."""
  width = keys('moe_intermediate_size')
  return {
      'experts': keys('n_routed_experts'), 'top_k': keys('num_experts_per_tok'), 'ffw_dim': width,
      'scores': 'sigmoid', 'bias': True, 'renormalise': keys('norm_topk_prob'),
      'scale': float(keys('routed_scaling_factor')), 'groups': keys('n_group'),
      'top_groups': keys('topk_group'), 'shared_dim': width * keys('n_shared_experts')}


def write_sigmoid(cfg: ModelConfig) -> dict[str, Any]:
  width = llama.sizes(cfg)['inner']
  return {
      'moe_intermediate_size': width, 'n_routed_experts': cfg.moe.experts,
      'num_experts_per_tok': cfg.moe.top_k, 'norm_topk_prob': cfg.moe.renormalise,
      'routed_scaling_factor': cfg.moe.scale, 'n_group': cfg.moe.groups,
      'topk_group': cfg.moe.top_groups, 'n_shared_experts': cfg.moe.shared_dim // width}


def read_stack(keys: Keys, mixer: str) -> dict[str, Any]:
  """Layers and experts, and what says of them only what they always are."""
  for name, only in ALWAYS.items():
    keys.expect(name, only)
  for name in ('ep_size', 'seq_aux', 'aux_loss_alpha'):
    keys(name, None)                   # of its training
  count, dense = keys('num_hidden_layers'), keys('first_k_dense_replace')
  depth = keys.depth('num_nextn_predict_layers', 0)
  kinds = ['mlp' if i < dense else 'moe' for i in range(count + 1)]
  ffns, moe = kinds[:count + bool(depth)], read_sigmoid(keys)
  return keys_lib.stack([(mixer, ffn) for ffn in kinds[:count]]) | keys_lib.read_mtp(
      depth, mixer, kinds[count]) | ({'moe': moe} if 'moe' in ffns else {})


def write_stack(cfg: ModelConfig) -> dict[str, Any]:
  dense = [ffn for _, ffn in cfg.all_layers].count('mlp')
  return {'hidden_act': 'silu', 'first_k_dense_replace': dense,
          'num_nextn_predict_layers': cfg.mtp.depth, **write_sigmoid(cfg)}


def read_deepseek(keys: Keys) -> dict[str, Any]:
  keys.expect('hidden_act', 'silu')
  keys.expect('attention_bias', False)
  keys('qk_head_dim', None)
  mla = read_mla(keys) | {'interleaved': keys('rope_interleave')}
  sizes = keys_lib.read_sizes(keys) | {'head_dim': mla['rope_dim']}
  return sizes | keys_lib.read_rope(keys) | read_stack(keys, 'mla') | {'mla': mla}


def write_deepseek(cfg: ModelConfig) -> dict[str, Any]:
  m = cfg.mla_sizes
  return keys_lib.write_sizes(cfg) | write_mla(cfg) | write_stack(cfg) | {
      'head_dim': m.rope_dim, 'qk_head_dim': m.nope_dim + m.rope_dim, 'attention_bias': False,
      'rope_interleave': cfg.mla.interleaved, 'rope_parameters': keys_lib.write_rope(cfg)}


def read_glm(keys: Keys) -> dict[str, Any]:
  keys.expect('hidden_act', 'silu')
  bias = ('q', 'k', 'v') if keys('attention_bias') else ()
  return keys_lib.read_sizes(keys) | keys_lib.read_rope(keys, partial=True) | read_stack(
      keys, 'attention') | {'attention_bias': bias, 'qk_norm': keys('use_qk_norm')}


def write_glm(cfg: ModelConfig) -> dict[str, Any]:
  return keys_lib.write_sizes(cfg) | llama.write_bias(cfg) | write_stack(cfg) | {
      'use_qk_norm': cfg.qk_norm, 'rope_parameters': keys_lib.write_rope(cfg, partial=True)}


COMMON = ALWAYS | {
    'tie_word_embeddings': False, 'rope_theta': 10_000.0, 'attention_bias': False,
    'norm_topk_prob': True, 'n_shared_experts': 1}

DEEPSEEK_LAYER = llama.NORMS + MLA + llama.MLP + EXPERTS
GLM_LAYER = llama.NORMS + llama.ATTENTION + llama.MLP + EXPERTS
FUSED = llama.FUSED + llama.of_heads(llama.FUSED)
DEEPSEEK_V3 = Family(
    model_type='deepseek_v3', architecture='DeepseekV3ForCausalLM', sizes=sizes,
    entries=llama.ENDS + DEEPSEEK_LAYER + llama.of_heads(DEEPSEEK_LAYER + HEAD), fused=FUSED,
    copies=COPIES, heads=LAYER, read=read_deepseek, write=write_deepseek,
    defaults=COMMON | {'rope_interleave': True, 'first_k_dense_replace': 3, 'n_group': 8,
                       'topk_group': 4, 'routed_scaling_factor': 2.5})
GLM4_MOE = Family(
    model_type='glm4_moe', architecture='Glm4MoeForCausalLM', sizes=sizes,
    entries=llama.ENDS + GLM_LAYER + llama.of_heads(GLM_LAYER + HEAD), fused=FUSED,
    copies=COPIES, heads=LAYER, read=read_glm, write=write_glm,
    defaults=COMMON | {'use_qk_norm': False, 'first_k_dense_replace': 1, 'n_group': 1,
                       'topk_group': 1, 'routed_scaling_factor': 1.0, 'partial_rotary_factor': 0.5})
