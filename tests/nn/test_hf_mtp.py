"""Heads of multi-token prediction of published checkpoints, which transformers does not read: their
names, what they compute, and what becomes of a folder that lacks them.
"""

import json
from fnmatch import fnmatch

import hf_parity as parity
import jax
import jax.numpy as jnp
import nn_tiny as tiny
import numpy as np
import pytest

from launch import hf_files
from nn import hf, model, mtp, param, score
from nn.types import mtp as want

COMMON = dict(
    vocab_size=64, hidden_size=16, intermediate_size=20, num_attention_heads=2, hidden_act='silu',
    max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False)
EXPERTS = dict(moe_intermediate_size=6, num_experts_per_tok=2)
SIGMOID = EXPERTS | dict(
    first_k_dense_replace=1, n_routed_experts=3, n_shared_experts=1, n_group=1, topk_group=1,
    num_hidden_layers=2)
LINEAR = dict(
    num_hidden_layers=2, num_key_value_heads=1, head_dim=8, full_attention_interval=2,
    linear_key_head_dim=4, linear_num_key_heads=1, linear_num_value_heads=2,
    linear_value_head_dim=6, linear_conv_kernel_dim=4)
SHARED = EXPERTS | dict(num_experts=3, shared_expert_intermediate_size=5)
CONFIGS = {
    'deepseek_v3': COMMON | SIGMOID | dict(
        num_nextn_predict_layers=2, num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=5,
        qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3),
    'glm4_moe': COMMON | SIGMOID | dict(
        num_nextn_predict_layers=1, num_key_value_heads=1, head_dim=8, partial_rotary_factor=0.5),
    'qwen3_next': COMMON | LINEAR | SHARED,
    'qwen3_5_text': COMMON | LINEAR | dict(
        mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False),
    'qwen3_5_moe_text': COMMON | LINEAR | SHARED | dict(mtp_num_hidden_layers=1),
}
CONFIGS['mimo'] = COMMON | dict(
    attention_bias=True, head_dim=8, num_hidden_layers=2, num_key_value_heads=1,
    num_nextn_predict_layers=2)
CONFIGS = {name: c | dict(model_type=name) for name, c in CONFIGS.items()}
# How names of the first head's layer begin, and its other tensors, in the order of OURS.
DEEPSEEK = ('model.layers.2.', 'enorm', 'hnorm', 'eh_proj', 'shared_head.norm')
QWEN = ('mtp.layers.0.', 'mtp.pre_fc_norm_embedding', 'mtp.pre_fc_norm_hidden', 'mtp.fc',
        'mtp.norm')
MIMO = ('model.mtp_layers.0.', 'token_layernorm', 'hidden_layernorm', 'input_proj',
        'final_layernorm')
HEADS = ('mtp.*', 'model.mtp_layers.*', 'model.layers.2.*', 'model.layers.3.*')
OURS = ('embedding_norm/scale', 'hidden_norm/scale', 'project', 'norm/scale')


def names_of(family):
  layer, *rest = {'deepseek_v3': DEEPSEEK, 'glm4_moe': DEEPSEEK, 'mimo': MIMO}.get(family, QWEN)
  return layer, [f'{n if n.startswith("mtp") else layer + n}.weight' for n in rest]


def make(family, folder, **changes):
  """A small model of random numbers as published, and as we read it."""
  config = CONFIGS[family] | changes
  cfg, rng = hf.model_config(config, heads=True), np.random.default_rng(0)
  leaves = {path: (0.3 * rng.standard_normal(s.shape) + (len(s.shape) < 2)).astype(np.float32)
            for path, s in param.flat(model.specs(cfg)).items()}
  hf_files.save(folder, cfg, leaves.__getitem__, origin=hf_files.Origin(config, {}, 'F32', {}))
  return parity.Both(None, folder, cfg, load(folder))


def load(folder):
  cfg = hf_files.model_config(folder)
  return hf_files.load(folder, cfg, param.abstract(model.specs(cfg)))


def rewrite(both, folder, change):
  """The folder again after change({name: array})."""
  tensors = parity.contents(both.folder)
  change(tensors)
  folder.mkdir()
  (folder / 'config.json').write_bytes((both.folder / 'config.json').read_bytes())
  stored = hf_files.allocate(folder / 'model.safetensors',
                             {name: ('F32', x.shape) for name, x in tensors.items()})
  for name, x in tensors.items():
    hf_files.mapped(stored[name], 'r+')[...] = x
  return folder


def without_heads(both, folder):
  return rewrite(both, folder, lambda tensors: [
      tensors.pop(name) for name in list(tensors) if any(fnmatch(name, p) for p in HEADS)])


@pytest.mark.parametrize('family', CONFIGS)
def test_every_tensor_of_a_head_has_its_place_and_goes_back_to_it(family, tmp_path):
  both = make(family, tmp_path / 'public')
  tensors, leaves = parity.contents(both.folder), param.flat(both.params)
  layer, names = names_of(family)
  for name, ours in zip(names, OURS):
    np.testing.assert_array_equal(tensors[name], leaves[f'mtp/0/{ours}'].T, err_msg=name)
  assert tensors[names[2]].shape == (16, 32)
  kinds = {name.removeprefix(layer).split('.')[0] for name in tensors if name.startswith(layer)}
  assert {'input_layernorm', 'post_attention_layernorm', 'self_attn', 'mlp'} <= kinds
  assert (layer + 'mlp.experts.2.up_proj.weight' in tensors) == (
      family not in ('qwen3_5_text', 'mimo'))
  parity.assert_every_tensor_counts(hf.FAMILIES[family], both)
  assert parity.same_bits(both.folder, parity.export(both, tmp_path / 'again'))
  if (depth := both.cfg.mtp.depth) > 1:
    second = names[2].replace('layers.2', 'layers.3').replace('mtp_layers.0', 'mtp_layers.1')
    np.testing.assert_array_equal(tensors[second], leaves['mtp/1/project'].T)
  new = hf.public_config(hf.FAMILIES[family], both.cfg)
  assert hf.model_config(json.loads(json.dumps(new)), heads=True).mtp == both.cfg.mtp
  assert not hf.model_config(new).mtp.depth and depth >= 1


@pytest.mark.parametrize('family', ['deepseek_v3', 'glm4_moe'])
def test_copies_of_tables_are_checked_and_only_written_where_they_were(family, tmp_path):
  both = make(family, tmp_path / 'public')
  embedding, head = (f'model.layers.2.{n}.weight' for n in ('embed_tokens', 'shared_head.head'))
  tensors = parity.contents(both.folder)
  np.testing.assert_array_equal(tensors[embedding], tensors['model.embed_tokens.weight'])
  np.testing.assert_array_equal(tensors[head], tensors['lm_head.weight'])
  fewer = rewrite(both, tmp_path / 'fewer', lambda tensors: tensors.pop(embedding))
  once = both._replace(folder=fewer, params=load(fewer))
  assert parity.same_bits(fewer, parity.export(once, tmp_path / 'again'))

  def change(tensors):
    tensors[head][0, 0] += 1

  other = rewrite(both, tmp_path / 'other', change)
  with pytest.raises(ValueError, match=f'{head} in .* is not the same as lm_head.weight'):
    load(other)
  hf_files.Opened(other, both.cfg, drop=[head])
  hf_files.Opened(other, hf.model_config(CONFIGS[family]))        # without heads


@pytest.mark.parametrize('family', CONFIGS)
def test_their_tensors_decide_whether_there_are_heads(family, tmp_path):
  both = make(family, tmp_path / 'public')
  bare = without_heads(both, tmp_path / 'bare')
  cfg = hf_files.model_config(bare)
  assert cfg == hf.model_config(CONFIGS[family]) and not cfg.mtp.depth
  assert parity.same_bits(bare, parity.export(
      both._replace(folder=bare, cfg=cfg, params=load(bare)), tmp_path / 'again'))
  _, names = names_of(family)
  assert hf_files.model_config(both.folder, HEADS) == cfg
  assert hf_files.heads(bare).startswith('no heads of multi-token prediction: no tensor of')
  assert 'are left out' in hf_files.heads(both.folder, HEADS)
  assert hf_files.heads(both.folder).startswith(f'{both.cfg.mtp.depth} head(s)')
  found = hf_files.Opened(both.folder, cfg)
  assert found.dtype('embed/table') == np.float32
  with pytest.raises(ValueError, match=f'{names[2]} is missing'):
    hf_files.Opened(both.folder, both.cfg, drop=[names[2]])


@pytest.mark.parametrize('family, change, fault', [
    ('deepseek_v3', dict(num_nextn_predict_layers=1), 'model.layers.3.* has no place in the model'),
    ('glm4_moe', dict(num_nextn_predict_layers=0), 'model.layers.2.* has no place in the model'),
    ('qwen3_5_text', dict(mtp_num_hidden_layers=0), 'mtp.* has no place in the model'),
    ('qwen3_5_text', dict(mtp_num_hidden_layers=2), 'mtp_num_hidden_layers is 2; known is 0 or 1'),
    ('qwen3_5_text', dict(mtp_use_dedicated_embeddings=True), 'known is False')])
def test_heads_that_a_config_does_not_count_are_refused(family, change, fault, tmp_path):
  both = make(family, tmp_path / 'public')
  (both.folder / 'config.json').write_text(json.dumps(CONFIGS[family] | change))
  with pytest.raises(ValueError, match=fault):
    load(both.folder)


@jax.jit
def _normed(x):
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def said(params, cfg, rows):
  """Log-probabilities of the first head, and the model's last hidden states."""
  output = model.forward(params, cfg, rows.tokens, rows.positions, rows.segments, heads={(): 1})
  return score.score(params, cfg, output, rows, (want(1),))[want(1)], output.hidden


@pytest.mark.parametrize('family', ['deepseek_v3', 'qwen3_next', 'mimo'])
def test_a_head_computes_what_the_published_names_mean(family, tmp_path):
  """With a layer that hands on what it gets: joined by the projection, normed, unembedded."""
  both = make(family, tmp_path / 'public')
  layer, names = names_of(family)

  def silence(tensors):
    for name in tensors:
      if name.startswith(layer) and ('o_proj' in name or 'down_proj' in name):
        tensors[name][...] = 0

  quiet = rewrite(both, tmp_path / 'quiet', silence)
  rows, ask = tiny.batch(tiny.tokens(2, 9)), jax.jit(said, static_argnums=1)
  found, hidden = ask(load(quiet), both.cfg, rows)

  tensors = parity.contents(quiet)
  plus = float(family.startswith('qwen'))          # norms that multiply by 1 + their weight
  embedding_gain, hidden_gain, joining, last_gain = (tensors[n] for n in names)
  pairs = np.concatenate([           # token t + 1, then what the model knows after t
      _normed(tensors['model.embed_tokens.weight'][rows.tokens[:, 1:]]) * (plus + embedding_gain),
      _normed(hidden[:, :-1]) * (plus + hidden_gain)], axis=-1)
  if family == 'mimo':
    joining = np.roll(joining, 16, axis=1)         # the two in the other order
  logits = _normed(pairs @ joining.T) * (plus + last_gain) @ tensors['lm_head.weight'].T
  logp = jax.nn.log_softmax(logits)[:, :-1]
  expected = np.take_along_axis(np.asarray(logp), np.asarray(rows.tokens)[:, 2:, None], -1)[..., 0]
  np.testing.assert_allclose(found[:, 2:], expected, atol=2e-5)
  assert not np.any(found[:, :2])

  def swap(tensors):
    tensors[names[2]] = np.roll(tensors[names[2]], 16, axis=1)

  swapped, _ = ask(load(rewrite(both._replace(folder=quiet), tmp_path / 'swapped', swap)),
                   both.cfg, rows)
  assert np.abs(swapped[:, 2:] - expected).max() > 0.1


@pytest.mark.parametrize('family', ['deepseek_v3', 'glm4_moe', 'qwen3_5_moe_text'])
def test_every_number_of_a_head_has_an_effect(family, tmp_path):
  both = make(family, tmp_path / 'public')
  rows, wants = tiny.batch(tiny.tokens(2, 40)), tuple(
      want(k + 1) for k in range(both.cfg.mtp.depth))

  @jax.jit
  def gradient(heads):
    def total(heads):
      params = both.params | {'mtp': heads}
      output = model.forward(params, both.cfg, rows.tokens, rows.positions, rows.segments,
                             heads=mtp.wanted(wants, both.cfg))
      found = score.score(params, both.cfg, output, rows, wants)
      return sum(jnp.sum(x ** 2) for x in found.values())
    return jax.grad(total)(heads)

  for path, x in param.flat(gradient(both.params['mtp'])).items():
    if path.endswith('ffn/bias'):      # only chooses
      continue
    moved = np.abs(np.asarray(x)) > 0
    assert moved.any() if x.ndim < 2 else moved.reshape(len(moved), -1).any(axis=1).all(), path


def test_deepseek_v3_s_head_has_the_published_size():
  """685 billion in the folder of which 671 are the model's, as its card says."""
  import test_hf_names as published
  config = published.DEEPSEEK_V3
  cfg = hf.model_config(config, heads=True)
  copies = sum(np.prod(p.layout.theirs) for p in hf.copies(hf.family_of(config), cfg))
  assert (param.count(model.specs(cfg)) + copies) / 1e9 == pytest.approx(684.5, abs=0.1)
