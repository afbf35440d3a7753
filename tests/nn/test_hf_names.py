"""Published checkpoints beyond what transformers writes: configs, other names, more tensors."""

import json

import numpy as np
import pytest

from nn import hf, model, param

# The published config.json of each, without what does not make the model.
DEEPSEEK_V3 = dict(
    model_type='deepseek_v3', attention_bias=False, aux_loss_alpha=0.001, ep_size=1,
    first_k_dense_replace=3, hidden_act='silu', hidden_size=7168, intermediate_size=18432,
    kv_lora_rank=512, max_position_embeddings=163840, moe_intermediate_size=2048, moe_layer_freq=1,
    n_group=8, n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True,
    num_attention_heads=128, num_experts_per_tok=8, num_hidden_layers=61, num_key_value_heads=128,
    num_nextn_predict_layers=1, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64,
    rms_norm_eps=1e-6, rope_scaling=dict(
        beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0,
        original_max_position_embeddings=4096, type='yarn'),
    rope_theta=10000, routed_scaling_factor=2.5, scoring_func='sigmoid', seq_aux=True,
    tie_word_embeddings=False, topk_group=4, topk_method='noaux_tc', v_head_dim=128,
    vocab_size=129280)
GLM_AIR = dict(
    model_type='glm4_moe', attention_bias=True, first_k_dense_replace=1, head_dim=128,
    hidden_act='silu', hidden_size=4096, intermediate_size=10944, max_position_embeddings=131072,
    moe_intermediate_size=1408, n_group=1, n_routed_experts=128, n_shared_experts=1,
    norm_topk_prob=True, num_attention_heads=96, num_experts_per_tok=8, num_hidden_layers=46,
    num_key_value_heads=8, num_nextn_predict_layers=1, partial_rotary_factor=0.5, rms_norm_eps=1e-5,
    rope_scaling=None, rope_theta=1000000, routed_scaling_factor=1.0, tie_word_embeddings=False,
    topk_group=1, use_qk_norm=False, vocab_size=151552)
QWEN3_NEXT = dict(
    model_type='qwen3_next', attention_bias=False, decoder_sparse_step=1, full_attention_interval=4,
    head_dim=256, hidden_act='silu', hidden_size=2048, intermediate_size=5120,
    linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_num_key_heads=16,
    linear_num_value_heads=32, linear_value_head_dim=128, max_position_embeddings=262144,
    mlp_only_layers=[], moe_intermediate_size=512, norm_topk_prob=True, num_attention_heads=16,
    num_experts=512, num_experts_per_tok=10, num_hidden_layers=48, num_key_value_heads=2,
    partial_rotary_factor=0.25, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=10000000,
    shared_expert_intermediate_size=512, tie_word_embeddings=False, use_sliding_window=False,
    vocab_size=151936)
KIMI_LINEAR = dict(
    model_type='kimi_linear', first_k_dense_replace=1, head_dim=72, hidden_act='silu',
    hidden_size=2304, intermediate_size=9216, kv_lora_rank=512, linear_attn_config=dict(
        full_attn_layers=[4, 8, 12, 16, 20, 24, 27], head_dim=128, num_heads=32,
        short_conv_kernel_size=4, kda_layers=[i for i in range(1, 27) if i % 4]),
    mla_use_nope=True, model_max_length=1048576, moe_intermediate_size=1024, moe_layer_freq=1,
    moe_renormalize=True, moe_router_activation_func='sigmoid', num_attention_heads=32,
    num_expert_group=1, num_experts=256, num_experts_per_token=8, num_hidden_layers=27,
    num_key_value_heads=32, num_nextn_predict_layers=0, num_shared_experts=1, q_lora_rank=None,
    qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-5, rope_scaling=None,
    rope_theta=10000.0, routed_scaling_factor=2.446, tie_word_embeddings=False, topk_group=1,
    use_grouped_topk=True, v_head_dim=128, vocab_size=163840)
QWEN3_5 = dict(
    model_type='qwen3_5', image_token_id=3, tie_word_embeddings=True, vision_config=dict(depth=2),
    text_config=dict(
        model_type='qwen3_5_text', attention_bias=False, attn_output_gate=True,
        full_attention_interval=2, head_dim=8, hidden_act='silu', hidden_size=12,
        intermediate_size=20, linear_conv_kernel_dim=4, linear_key_head_dim=4,
        linear_num_key_heads=1, linear_num_value_heads=2, linear_value_head_dim=6,
        mamba_ssm_dtype='float32', max_position_embeddings=64, mtp_num_hidden_layers=1,
        num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=1, rms_norm_eps=1e-6,
        rope_parameters=dict(mrope_interleaved=True, mrope_section=[1, 0, 0],
                             partial_rotary_factor=0.25, rope_theta=1e7, rope_type='default'),
        vocab_size=10))


@pytest.mark.parametrize('config, billions', [
    (DEEPSEEK_V3, 671.0), (GLM_AIR, 106.9), (QWEN3_NEXT, 79.7), (KIMI_LINEAR, 49.1)],
    ids=lambda x: x['model_type'] if isinstance(x, dict) else '')
def test_published_configs_give_the_published_number_of_parameters(config, billions):
  """As their model cards and headers of safetensors say, layers after the last apart."""
  cfg = hf.model_config(config)
  assert param.count(model.specs(cfg)) / 1e9 == pytest.approx(billions, abs=0.06)
  again = hf.public_config(hf.family_of(config), cfg)
  assert hf.model_config(json.loads(json.dumps(again))).layers == cfg.layers
  assert cfg.repeats >= 6 or config is KIMI_LINEAR


def drawn(config, heads=False):
  """The model, its parameters by path, and the tensors they make up, all numbers different."""
  cfg, family = hf.model_config(config, heads), hf.family_of(config)
  rng, tensors = np.random.default_rng(0), {}
  params = {path: rng.standard_normal(s.shape).astype(np.float32)
            for path, s in param.flat(model.specs(cfg)).items()}
  for p in hf.pieces(family, cfg):
    hf.write(p, params[p.path][p.lead],
             tensors.setdefault(p.tensor, np.empty(p.layout.theirs, np.float32)))
  return cfg, params, tensors


def assert_read(config, cfg, tensors, params):
  plan = hf.plan(hf.family_of(config), cfg, {name: t.shape for name, t in tensors.items()})
  for path, expected in params.items():
    whole = tuple(slice(0, n) for n in expected.shape)
    np.testing.assert_array_equal(hf.read(
        plan[path], expected.shape, whole, tensors.__getitem__, np.float32), expected, err_msg=path)


def test_the_text_of_a_model_that_sees_is_read_under_its_names():
  cfg, params, tensors = drawn(QWEN3_5)
  assert cfg.tied and cfg.layers == (('gdn', 'mlp'), ('attention', 'mlp'))
  seeing = {name.replace('model.', 'model.language_model.'): t for name, t in tensors.items()}
  assert_read(QWEN3_5, cfg, seeing, params)
  with pytest.raises(ValueError, match='model.visual.blocks.0.norm1.bias has no place'):
    assert_read(QWEN3_5, cfg, seeing | {'model.visual.blocks.0.norm1.bias': np.ones(4)}, params)
  cfg, params, tensors = drawn(QWEN3_5, heads=True)      # whose head has the same names there
  assert 'mtp.layers.0.self_attn.q_proj.weight' in tensors
  assert_read(QWEN3_5, cfg, {name.replace('model.', 'model.language_model.', 1): t
                             for name, t in tensors.items()}, params)
  text = hf.public_config(hf.family_of(QWEN3_5), cfg, QWEN3_5)
  assert text['architectures'] == ['Qwen3_5ForCausalLM'] and 'vision_config' not in text


def test_layers_after_the_last_of_a_family_without_heads_are_refused_by_name():
  cfg, params, tensors = drawn(SMALL_KIMI, heads=True)
  name = 'model.layers.2.eh_proj.weight'
  with pytest.raises(ValueError, match=f'{name} has no place in the model'):
    assert_read(SMALL_KIMI, cfg, tensors | {name: np.ones((12, 24), np.float32)}, params)


SMALL_KIMI = KIMI_LINEAR | dict(
    hidden_size=12, intermediate_size=20, kv_lora_rank=5, moe_intermediate_size=6,
    num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_token=2,
    num_hidden_layers=2,
    qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3, vocab_size=10, linear_attn_config=dict(
        full_attn_layers=[2], kda_layers=[1], head_dim=4, num_heads=3, short_conv_kernel_size=4))


def test_kimi_s_dense_layers_are_read_under_either_name():
  """transformers saves them as if they had experts; the published files do not."""
  cfg, params, tensors = drawn(SMALL_KIMI)
  assert cfg.layers == (('gdn', 'mlp'), ('mla', 'moe'))
  assert 'model.layers.0.mlp.up_proj.weight' in tensors
  assert_read(SMALL_KIMI, cfg, tensors, params)
  other = {name.replace('.mlp.', '.block_sparse_moe.'): t for name, t in tensors.items()}
  assert_read(SMALL_KIMI, cfg, other, params)


@pytest.mark.parametrize('change, message', [
    (dict(mla_use_nope=False), 'mla_use_nope is False; known is True'),
    (dict(linear_attn_config=dict(kda_layers=[1], full_attn_layers=[])),
     r'linear_attn_config names 1 layers of 2: \[1\]'),
    (dict(mlp_layer_types=['dense', 'wide']), "mlp_layer_types is .*wanted 2 of"),
    (dict(scoring_func='softmax'), 'keys without a meaning here: scoring_func')])
def test_what_a_model_cannot_do_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    hf.model_config(SMALL_KIMI | change)
