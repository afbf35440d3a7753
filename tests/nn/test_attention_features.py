"""What families of models add to attention and its layer: windows, biases, gates, norms, rotary
angles of longer contexts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import nn_tiny as tiny
import numpy as np
import pytest

from nn import attention, block, mlp, model, norm, param, rope
from nn.config import Rope, from_dict

YARN = Rope(kind='yarn', factor=4.0, length=16)
FEATURES = {
    'local': dict(pattern=('local', 'attention'), window=5, local_theta=50.0),
    'partial': dict(rope_share=0.5),
    'yarn': dict(rope=YARN),
    'biases': dict(attention_bias=('q', 'k', 'v', 'o')),
    'gate': dict(attention_gate=True, attention_bias=('gate',)),
    'gemma': dict(unit_offset=True, post_norms=True, activation='gelu_tanh', scale_embed=True,
                  query_scalar=9, pattern=('local',), tail=('attention',), window=3),
}


def parameters(cfg, seed=0):
  """Every array is random, the biases included."""
  rng = np.random.default_rng(seed)
  draw = lambda s: jnp.asarray(0.4 * rng.standard_normal(s.shape), jnp.float32)
  return jax.tree.map(draw, model.specs(cfg))


@pytest.mark.parametrize('name', FEATURES)
def test_prompt_and_steps_equal_the_forward_pass(name):
  cfg = tiny.config(**FEATURES[name])
  params = parameters(cfg)
  length, prompt, pad = 12, 6, (0, 3)
  rows = tiny.batch(tiny.tokens(2, length))
  expected = tiny.forward(params, cfg, rows).hidden

  start = jnp.array(pad)               # rows of one prompt size, the second padded on the left
  tokens = np.stack([np.r_[np.zeros(n, int), np.asarray(rows.tokens[b])][:prompt + 3]
                     for b, n in enumerate(pad)])
  read = jax.jit(model.prefill, static_argnums=(1, 4))
  step = jax.jit(model.step, static_argnums=1)
  hidden, state, _ = read(params, cfg, jnp.asarray(tokens, jnp.int32), start, prompt + 3 + length)
  at = tokens.shape[1] - np.array(pad) - 1
  while True:
    for b in range(2):
      np.testing.assert_allclose(hidden[b], expected[b, at[b]], atol=3e-5)
    at = at + 1
    if at.max() == length:
      return
    hidden, state, _ = step(
        params, cfg, jnp.stack([rows.tokens[b, at[b]] for b in range(2)]), state)


@pytest.mark.parametrize('name', FEATURES)
def test_packed_rows_and_padding_change_nothing(name):
  cfg = tiny.config(**FEATURES[name])
  params = parameters(cfg)
  tokens = tiny.tokens(1, 20)
  packed = tiny.batch(np.pad(tokens, ((0, 0), (2, 3))), [[0, 0] + [1] * 10 + [2] * 10 + [0] * 3])
  apart = tiny.batch(tokens.reshape(2, 10))
  np.testing.assert_allclose(
      tiny.forward(params, cfg, packed).hidden[:, 2:-3].reshape(2, 10, -1),
      tiny.forward(params, cfg, apart).hidden, atol=3e-5)


def test_a_local_layer_reaches_back_by_its_window_and_no_further():
  cfg = tiny.config(head=(), pattern=('local',), repeats=1, window=4, tied=False)
  params = parameters(cfg)
  rows = tiny.batch(np.arange(12)[None])

  def at_nine(table):
    return jnp.sum(tiny.forward(params | {'embed': {'table': table}}, cfg, rows).hidden[0, 9] ** 3)

  reached = np.abs(jax.jit(jax.grad(at_nine))(params['embed']['table'])).max(axis=1) > 0
  np.testing.assert_array_equal(np.flatnonzero(reached), [6, 7, 8, 9])


def test_a_local_layer_has_its_own_base_and_unscaled_angles():
  cfg = tiny.config(head=(), pattern=('local',), repeats=1, window=99, local_theta=77.0, rope=YARN)
  plain = tiny.config(head=(), repeats=1, rope_theta=77.0)
  params = parameters(cfg)
  rows = tiny.batch(tiny.tokens(2, 9))
  np.testing.assert_allclose(
      tiny.forward(params, cfg, rows).hidden, tiny.forward(params, plain, rows).hidden, atol=1e-6)


def test_only_the_share_of_a_head_is_turned():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 8)), jnp.float32)
  positions = jnp.array([0, 5, 90])
  turned = rope.rotate(x, positions, 100.0, share=0.5)
  np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
  np.testing.assert_allclose(turned[..., :4], rope.rotate(x[..., :4], positions, 100.0), rtol=1e-6)


def test_linear_scaling_divides_every_rate():
  np.testing.assert_allclose(
      rope.scale_rates(jnp.array([1.0, 0.5]), 1e4, Rope(kind='linear', factor=4.0)), [0.25, 0.125])


def test_llama3_scaling_by_hand():
  # Over 20 pi positions a rate of 1, 0.25, 0.1, 0.01 turns 10, 2.5, 1, 0.1 times; 1 to 4 pass over.
  scaling = Rope(kind='llama3', factor=8.0, length=63)
  rates = jnp.array([1.0, 2.5, 1.0, 0.1]) * jnp.array([10, 1, 1, 1]) * 2 * np.pi / 63
  half = 0.5 * 2.5 + 0.5 * 2.5 / 8     # (2.5 - 1) / (4 - 1) = 1 / 2
  expected = np.array([10, half, 1 / 8, 0.1 / 8]) * 2 * np.pi / 63
  np.testing.assert_allclose(rope.scale_rates(rates, 1e4, scaling), expected, rtol=1e-5)


def test_yarn_scaling_by_hand():
  # theta 10**8 and 8 pairs: pair i turns 10**(6 - i) / (2 pi) times over 10**6 positions. 32 turns
  # are at pair 3.7 and 1 turn at pair 5.2, so pairs 0 to 3 stay and from 6 on are divided by 2.
  scaling = Rope(kind='yarn', factor=2.0, length=10**6)
  kept = rope.scale_rates(jnp.ones(8), 1e8, scaling)
  np.testing.assert_allclose(kept, [1, 1, 1, 1, 5 / 6, 4 / 6, 0.5, 0.5], rtol=1e-6)
  smooth = rope.scale_rates(jnp.ones(8), 1e8, dataclasses.replace(scaling, truncate=False))
  assert 0.5 < smooth[5] < 5 / 6 < smooth[4] < 1 and smooth[6] == 0.5
  np.testing.assert_allclose(scaling.attention_gain, 0.1 * np.log(2) + 1)
  ratio = dataclasses.replace(scaling, mscale=2.0, mscale_all_dim=1.0).attention_gain
  np.testing.assert_allclose(ratio, (0.2 * np.log(2) + 1) / (0.1 * np.log(2) + 1))
  x = jnp.ones((1, 1, 8))
  still = rope.rotate(x, jnp.array([0]), 1e4, dataclasses.replace(scaling, gain=3.0), share=0.5)
  np.testing.assert_array_equal(still[0, 0], [3, 3, 3, 3, 1, 1, 1, 1])


def test_biases_gate_and_scale_by_hand():
  """A position that attends to itself alone: (v + b) * sigmoid(gate) through o, plus its bias."""
  cfg = tiny.config(head=(), repeats=1, attention_gate=True, attention_bias=('v', 'gate', 'o'))
  p = jax.tree.map(lambda a: a[0], parameters(cfg)['blocks']['0']['mixer'])
  x = jnp.asarray(np.random.default_rng(3).standard_normal((1, 1, cfg.embed_dim)), jnp.float32)
  ones = jnp.ones((1, 1), jnp.int32)
  v = np.repeat(np.einsum('d,dgk->gk', x[0, 0], p['v']) + p['v_bias'], 2, axis=0)
  gate = np.einsum('d,dhk->hk', x[0, 0], p['gate']) + p['gate_bias']
  expected = np.einsum('hk,hkd->d', v / (1 + np.exp(-gate)), p['o']) + p['o_bias']
  np.testing.assert_allclose(attention.apply(p, cfg, x, 0 * ones, ones)[0, 0], expected, atol=1e-5)
  shapes = {name: s.shape for name, s in attention.specs(cfg).items() if name.endswith('bias')}
  assert shapes == {'v_bias': (2, 4), 'gate_bias': (4, 4), 'o_bias': (16,)}


def test_scores_are_divided_by_the_root_of_the_query_scalar():
  cfg = tiny.config(head=(), repeats=1, qk_norm=False)
  params = parameters(cfg)
  mixer = params['blocks']['0']['mixer']
  layer = params['blocks']['0'] | {'mixer': mixer | {'q': mixer['q'] / 3}}
  rows = tiny.batch(tiny.tokens(2, 9))
  np.testing.assert_allclose(
      tiny.forward(params, dataclasses.replace(cfg, query_scalar=4 * 9), rows).hidden,
      tiny.forward(params | {'blocks': {'0': layer}}, cfg, rows).hidden, atol=1e-5)


def test_gains_count_from_one_with_unit_offset():
  plain, offset = tiny.config(), tiny.config(unit_offset=True)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 16)), jnp.float32)
  scale = jnp.linspace(-0.5, 0.5, 16)
  np.testing.assert_array_equal(
      norm.apply({'scale': scale}, offset, x), norm.apply({'scale': 1 + scale}, plain, x))
  init = model.init(jax.random.key(0), offset)
  np.testing.assert_array_equal(init['norm']['scale'], 0)
  np.testing.assert_array_equal(init['blocks']['0']['mixer']['q_norm']['scale'], 0)


def test_a_layer_with_post_norms_adds_normalised_outputs():
  cfg = tiny.config(post_norms=True)
  p = jax.tree.map(lambda a: a[0], parameters(cfg)['blocks']['0'])
  x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 5, 16)), jnp.float32)
  ones, positions = jnp.ones((1, 5), jnp.int32), jnp.arange(5)[None]
  rms = functools.partial(norm.apply, cfg=cfg)
  y = attention.apply(p['mixer'], cfg, rms(p['mixer_norm'], x=x), positions, ones)
  mid = x + rms(p['mixer_post_norm'], x=y)
  y = mlp.apply(p['ffn'], cfg, rms(p['ffn_norm'], x=mid), ones)[0]
  actual = block.apply(p, cfg, ('attention', 'mlp'), x, positions, ones)[0]
  np.testing.assert_allclose(actual, mid + rms(p['ffn_post_norm'], x=y), atol=1e-5)


def test_embeddings_are_scaled_by_a_root_rounded_to_their_dtype():
  cfg = tiny.config(scale_embed=True, embed_dim=48, head=(), repeats=0, tail=('attention',),
                    dtype='bfloat16')
  table = jnp.ones((40, 48))
  x = model._embed({'embed': {'table': table}}, cfg, jnp.array([[1]]))
  assert float(x[0, 0, 0]) == float(jnp.bfloat16(48 ** 0.5)) == 6.9375


def test_defaults_add_no_parameter():
  names = set(param.flat(model.specs(tiny.config(qk_norm=False))))
  assert {n.split('/', 2)[-1] for n in names if n.startswith('blocks')} == {
      'mixer_norm/scale', 'ffn_norm/scale', 'mixer/q', 'mixer/k', 'mixer/v', 'mixer/o', 'ffn/gate',
      'ffn/up', 'ffn/down'}


@pytest.mark.parametrize('changes, fault', [
    (dict(window=4), 'no layer has the mixer local'),
    (dict(pattern=('local',)), 'window is 0'),
    (dict(rope_share=0.7, head_dim=10), 'even number'),
    (dict(attention_bias=('gate',)), r"names \['gate'\]"),
    (dict(activation='relu'), "activation is 'relu'"),
    (dict(activation='gelu_tanh', ffn='moe'), 'experts have silu'),
    (dict(local_theta=-1.0), 'local_theta is -1'),
    (dict(query_scalar=-1), 'query_scalar is -1'),
])
def test_settings_that_cannot_be_meant_are_refused(changes, fault):
  with pytest.raises(ValueError, match=fault):
    tiny.config(**changes)


@pytest.mark.parametrize('changes, fault', [
    (dict(kind='ntk'), "kind is 'ntk'"), (dict(factor=2.0), 'kind is not'),
    (dict(kind='yarn'), 'length is 0'), (dict(kind='linear', factor=0.0), 'factor is 0'),
    (dict(kind='llama3', length=9, slow=5.0), 'between 0 and model.rope.fast, 4.0'),
])
def test_scalings_that_cannot_be_meant_are_refused(changes, fault):
  with pytest.raises(ValueError, match=fault):
    Rope(**changes)


def test_a_config_survives_json():
  cfg = tiny.config(**FEATURES['gemma'], rope=YARN, attention_bias=('q',))
  assert from_dict(dataclasses.asdict(cfg)) == cfg
