"""Layouts worked by hand, configs read both ways, and what is refused by name."""

import dataclasses

import numpy as np
import pytest

from nn import hf, model, param
from nn.config import MoE, Rope
from nn.hf import keys, table
from nn.hf.table import Entry, Layout

LLAMA = {
    'model_type': 'llama', 'vocab_size': 11, 'hidden_size': 8, 'intermediate_size': 12,
    'num_hidden_layers': 3, 'num_attention_heads': 2, 'num_key_value_heads': 1, 'head_dim': 4,
    'hidden_act': 'silu', 'rms_norm_eps': 1e-5, 'max_position_embeddings': 64,
    'rope_theta': 500.0, 'tie_word_embeddings': True}
QWEN3_MOE = LLAMA | {
    'model_type': 'qwen3_moe', 'num_experts': 3, 'num_experts_per_tok': 2,
    'moe_intermediate_size': 5, 'norm_topk_prob': True, 'mlp_only_layers': [0]}
GEMMA3 = {name: x for name, x in LLAMA.items() if name not in ('hidden_act', 'rope_theta')} | {
    'model_type': 'gemma3_text', 'hidden_activation': 'gelu_pytorch_tanh', 'sliding_window': 6,
    'query_pre_attn_scalar': 16, 'sliding_window_pattern': 3}


def test_heads_of_a_projection_by_hand():
  # Rows 0 and 1 of the tensor are head 0, rows 2 and 3 head 1.
  layout = Layout(Entry('', '', '(heads head_dim) embed -> embed heads head_dim'),
                  {'heads': 2, 'head_dim': 2, 'embed': 3})
  tensor = np.arange(12).reshape(4, 3)
  cell = layout.view(tensor).reshape(layout.ours)
  assert layout.theirs == (4, 3) and layout.ours == (3, 2, 2)
  np.testing.assert_array_equal(cell[:, 1, 0], tensor[2])
  np.testing.assert_array_equal(cell[2], [[2, 5], [8, 11]])


def test_parts_of_a_fused_tensor_by_hand():
  # Per group a query of 2, a key of 1 and values of 2 x 1: rows q q k v v, q q k v v.
  sizes = {'groups': 2, 'embed': 1, 'q': 2, 'k': 1, 'v': 'ratio width', 'ratio': 2, 'width': 1}
  rows = lambda layout, part: table.Layout(Entry('', '', layout, part), sizes).view(
      np.arange(10).reshape(10, 1)).tolist()
  fused = '(groups q+k+v) embed -> '
  assert rows(fused + 'embed groups q', 'q') == [[[0, 1], [5, 6]]]
  assert rows(fused + 'embed groups k', 'k') == [[[2], [7]]]
  assert rows(fused + 'embed (groups ratio) width', 'v') == [[[[3], [4]], [[8], [9]]]]


def test_writing_is_reading_backwards():
  sizes = {'a': 2, 'b': 3, 'c': 4, 'd': 5, 'e': 2}
  for text, part in (('(a b) c -> c b a', ''), ('a b+c+d e -> (e d) a', 'd'), ('a 1 c -> c a', '')):
    layout = Layout(Entry('', '', text, part), sizes)
    tensor = np.random.default_rng(0).standard_normal(layout.theirs)
    cell = layout.view(tensor).reshape(layout.ours).copy()
    again = np.zeros_like(tensor)
    table.write(table.Piece('', '', (), layout), cell, again)
    np.testing.assert_array_equal(layout.view(again).reshape(layout.ours), cell)
    assert np.count_nonzero(again) == cell.size


def tensors(cfg, family, seed=0):
  rng = np.random.default_rng(seed)
  return {p.tensor: rng.standard_normal(p.layout.theirs).astype(np.float32)
          for p in hf.pieces(family, cfg)}


@pytest.mark.parametrize('config', [LLAMA, QWEN3_MOE, GEMMA3])
def test_any_block_of_a_parameter_is_that_of_the_whole(config):
  cfg, family = hf.model_config(config), hf.family_of(config)
  found = tensors(cfg, family)
  plan = hf.plan(family, cfg, {name: x.shape for name, x in found.items()})
  rng = np.random.default_rng(1)
  for path, s in param.flat(model.specs(cfg)).items():
    read = lambda index: hf.read(plan[path], s.shape, index, found.__getitem__, np.float32)
    whole = read(tuple(slice(None) for _ in s.shape))
    cut = [tuple(sorted(rng.choice(n + 1, 2, replace=False))) for n in s.shape]
    index = tuple(slice(int(a), int(b)) for a, b in cut)
    np.testing.assert_array_equal(read(index), whole[index])


def test_another_division_into_layers_holds_the_same_numbers():
  cfg, family = hf.model_config(QWEN3_MOE), hf.FAMILIES['qwen3_moe']
  apart = dataclasses.replace(cfg, head=cfg.layers, repeats=0, pattern=('attention',), tail=())
  found = tensors(cfg, family)
  shapes = {name: x.shape for name, x in found.items()}

  def layer(cfg, i, name):
    place, lead = model.places(cfg)[i]
    path = f'{place}/{name}'
    s, plan = param.flat(model.specs(cfg))[path], hf.plan(family, cfg, shapes)
    whole = tuple(slice(None) for _ in s.shape)
    return hf.read(plan[path], s.shape, whole, found.__getitem__, np.float32)[lead]

  for name in ('mixer/q', 'ffn/down', 'ffn_norm/scale'):
    for i in range(3):
      np.testing.assert_array_equal(layer(cfg, i, name), layer(apart, i, name))
  assert not hf.differences(cfg, apart)


@pytest.mark.parametrize('change, fault', [
    (lambda s: s.pop('model.layers.1.self_attn.k_proj.weight'),
     r'model\.layers\.1\.self_attn\.k_proj\.weight is missing'),
    (lambda s: s.update({'model.layers.3.mlp.up_proj.weight': (12, 8)}),
     r'model\.layers\.3\.mlp\.up_proj\.weight has no place'),
    (lambda s: s.update({'lm_head.weight': (11, 8)}), 'lm_head.weight has no place'),
    (lambda s: s.update({'model.norm.weight': (9,)}),
     r'model\.norm\.weight has shape \(9,\), wanted \(8,\)'),
    (lambda s: s.update({'model.layers.0.self_attn.q_proj.bias': (8,)}),
     'q_proj.bias has no place'),
])
def test_tensors_that_do_not_fit_are_named(change, fault):
  cfg = hf.model_config(LLAMA)
  shapes = {name: x.shape for name, x in tensors(cfg, hf.FAMILIES['llama']).items()}
  shapes['model.layers.0.self_attn.rotary_emb.inv_freq'] = (2,)      # follows from the config
  hf.plan(hf.FAMILIES['llama'], cfg, shapes)
  change(shapes)
  with pytest.raises(ValueError, match=fault):
    hf.plan(hf.FAMILIES['llama'], cfg, shapes)


@pytest.mark.parametrize('changes, fault', [
    (dict(model_type='gpt2'), "model_type is 'gpt2'; known are llama"),
    (dict(hidden_act='relu'), "hidden_act is 'relu'"),
    (dict(mlp_bias=True), 'mlp_bias = True'),
    (dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping = 50.0'),
    (dict(rope_scaling={'type': 'dynamic', 'factor': 2.0}), "rope_type is 'dynamic'"),
    (dict(rope_scaling={'type': 'linear'}), 'needs factor'),
    (dict(rope_scaling={'type': 'linear', 'rope_type': 'yarn', 'factor': 2.0}),
     "and type 'linear'"),
    (dict(rope_scaling={'rope_type': 'linear', 'factor': 2.0, 'beta_fast': 3}), 'has no beta_fast'),
    (dict(partial_rotary_factor=0.5), 'partial_rotary_factor is 0.5'),
    (dict(quantization_config={'bits': 4}), 'quantization_config'),
    (dict(vocab_size=None), 'no vocab_size'),
    (dict(model_type='qwen3', layer_types=['full_attention', 'linear_attention', 'full_attention']),
     "'linear_attention'"),
    (dict(model_type='qwen3', layer_types=['full_attention']), '1 layer_types for 3 layers'),
    (dict(model_type='qwen3', layer_types=['sliding_attention'] * 3), 'without use_sliding_window'),
    (dict(model_type='qwen3', use_sliding_window=True, sliding_window=9, max_window_layers=1,
          rope_scaling={'rope_type': 'yarn', 'factor': 2.0}), "'yarn' in layers with a window"),
])
def test_configs_that_mean_something_else_are_refused_by_name(changes, fault):
  with pytest.raises(ValueError, match=fault):
    hf.model_config(LLAMA | changes)


def test_older_names_of_keys_mean_the_same():
  scaling = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
             'original_max_position_embeddings': 32}
  old = hf.model_config(LLAMA | {'rope_scaling': {'type': 'llama3', **scaling}})
  bare = {name: x for name, x in LLAMA.items() if name != 'rope_theta'}
  new = hf.model_config(bare | {'rope_parameters': {
      'rope_type': 'llama3', 'rope_theta': 500, **scaling}})
  assert old == new and old.rope == Rope(
      kind='llama3', factor=8.0, length=32, slow=1.0, fast=4.0)
  assert hf.model_config(bare).rope_theta == 10_000.0

  old = hf.model_config(GEMMA3 | {
      'rope_theta': 7e5, 'rope_local_base_freq': 300.0,
      'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}})
  new = hf.model_config(GEMMA3 | {'rope_parameters': {
      'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 7e5},
      'sliding_attention': {'rope_type': 'default', 'rope_theta': 300.0}}})
  assert old == new
  assert (old.rope_theta, old.local_theta, old.rope.factor) == (7e5, 300.0, 8.0)
  assert [mixer for mixer, _ in old.layers] == ['local', 'local', 'attention']


def test_what_a_config_leaves_open_is_what_its_class_assumes():
  bare = {name: x for name, x in QWEN3_MOE.items() if name not in (
      'norm_topk_prob', 'tie_word_embeddings', 'mlp_only_layers')}
  cfg = hf.model_config(bare | {'decoder_sparse_step': 2})
  assert not cfg.tied and not cfg.moe.renormalise
  assert [ffn for _, ffn in cfg.layers] == ['mlp', 'moe', 'mlp']


def pairs(text):
  return [({'a': 'attention', 'l': 'local', 'm': 'attention'}[c], 'moe' if c == 'm' else 'mlp')
          for c in text]


@pytest.mark.parametrize('text, head, pattern, repeats, tail', [
    ('aaaa', 0, 1, 4, 0), ('lllllalllllall', 0, 6, 2, 2), ('ammm', 1, 1, 3, 0),
    ('laalaa', 0, 3, 2, 0), ('a', 0, 1, 1, 0), ('alala', 0, 2, 2, 1),
])
def test_a_list_of_layers_becomes_the_shortest_stack(text, head, pattern, repeats, tail):
  fields = keys.stack(pairs(text))
  sizes = [len(fields['head']), len(fields['pattern']), fields['repeats'], len(fields['tail'])]
  assert sizes == [head, pattern, repeats, tail]
  cfg = dataclasses.replace(
      hf.model_config(LLAMA), moe=MoE(ffw_dim=4) if 'm' in text else MoE(),
      window=5 if 'l' in text else 0, **fields)
  assert list(cfg.layers) == pairs(text)


def test_a_model_of_ours_finds_a_family_that_can_say_it():
  cfg = hf.model_config(LLAMA)
  assert hf.choose(cfg) is hf.FAMILIES['llama']
  assert hf.choose(dataclasses.replace(cfg, attention_bias=('q', 'k', 'v'))) is hf.FAMILIES['qwen2']
  assert hf.choose(dataclasses.replace(cfg, qk_norm=True, dtype='bfloat16')) is hf.FAMILIES['qwen3']
  with pytest.raises(ValueError, match="cannot say that model.attention_bias is"):
    hf.public_config(hf.FAMILIES['qwen3'], dataclasses.replace(
        cfg, qk_norm=True, attention_bias=('q',)))


def test_a_config_stays_as_it_came_while_it_is_true():
  odd = LLAMA | {'bos_token_id': 7, 'transformers_version': '4.0'}
  cfg, family = hf.model_config(odd), hf.FAMILIES['llama']
  assert hf.public_config(family, dataclasses.replace(cfg, dtype='bfloat16'), odd) == odd
  new = hf.public_config(family, dataclasses.replace(cfg, norm_eps=0.5), odd)
  assert new['rms_norm_eps'] == 0.5 and new['bos_token_id'] == 7
  assert 'transformers_version' not in new
