"""Laws of the decoder: causality, packing, padding, the cache.

And that layout and recomputation change nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import nn_tiny as tiny
import numpy as np
import pytest

from nn import block, model, param, score
from nn.config import ModelConfig
from nn.types import LOGP


STACKS = {'attention': {}, 'mla': tiny.LATENT}


def assert_close(actual, expected, rtol=1e-5):
  """Every leaf to rtol of its largest entry."""
  flat_actual, flat_expected = param.flat(actual), param.flat(expected)
  assert flat_actual.keys() == flat_expected.keys()
  for name, e in flat_expected.items():
    e = np.asarray(e, np.float32)
    np.testing.assert_allclose(
        np.asarray(flat_actual[name], np.float32), e, rtol=0,
        atol=rtol * max(np.abs(e).max(), 1e-6), err_msg=name)


@functools.partial(jax.jit, static_argnums=1)
def passes(params, cfg, batch, weights):
  """Hidden states, sum weights * logp, and its gradient."""
  def loss(params):
    output = tiny.forward(params, cfg, batch)
    logp = score.score(params, cfg, output, batch, (LOGP,))[LOGP]
    return jnp.sum(weights * logp), output.hidden
  (value, hidden), grad = jax.value_and_grad(loss, has_aux=True)(params)
  return hidden, value, grad


def loss_and_grad(params, cfg, batch, weights):
  return passes(params, cfg, batch, weights)[1:]


def draw_weights(shape):
  return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def as_head(params, cfg):
  """The same layers as entries of their own: parameters and config without a scan."""
  layers = [params['head']['0']]
  for r in range(cfg.repeats):
    layers += [jax.tree.map(lambda a, r=r: a[r], layer) for layer in params['blocks'].values()]
  layers += list(params.get('tail', {}).values())
  numbered = {str(i): layer for i, layer in enumerate(layers)}
  rest = {name: a for name, a in params.items() if name not in ('head', 'blocks', 'tail')}
  return rest | {'head': numbered}, dataclasses.replace(cfg, head=cfg.layers, repeats=0, tail=())


def by_hand(params, cfg, tokens):
  """Hidden states of one row [T] in float64 and plain numpy, a position and a head at a time."""
  wide = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float64), tree)

  def rms(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + cfg.norm_eps) * scale

  def turn(x, t):
    half = cfg.head_dim // 2
    pair = x[:half] + 1j * x[half:]
    pair = pair * np.exp(1j * t * cfg.rope_theta ** (-np.arange(half) / half))
    return np.concatenate([pair.real, pair.imag])

  def attend(p, x):
    out = np.zeros((len(x), cfg.num_heads, cfg.head_dim))
    for h in range(cfg.num_heads):
      g = h // (cfg.num_heads // cfg.num_kv_heads)
      q = [turn(rms(a @ p['q'][:, h], p['q_norm']['scale']), t) for t, a in enumerate(x)]
      k = [turn(rms(a @ p['k'][:, g], p['k_norm']['scale']), t) for t, a in enumerate(x)]
      for t in range(len(x)):
        weights = np.exp([q[t] @ k[s] / np.sqrt(cfg.head_dim) for s in range(t + 1)])
        out[t, h] = weights / weights.sum() @ (x[:t + 1] @ p['v'][:, g])
    return np.einsum('thk,hkd->td', out, p['o'])

  def feed(p, x):
    gate = x @ p['gate']
    return (gate / (1 + np.exp(-gate)) * (x @ p['up'])) @ p['down']

  params = wide(params)
  x = params['embed']['table'][tokens]
  for layer in as_head(params, cfg)[0]['head'].values():
    x = x + attend(layer['mixer'], rms(x, layer['mixer_norm']['scale']))
    x = x + feed(layer['ffn'], rms(x, layer['ffn_norm']['scale']))
  return rms(x, params['norm']['scale'])


def test_forward_matches_plain_numpy():
  cfg = tiny.config(**tiny.FULL_STACK)
  params = tiny.params(cfg)
  rows = tiny.batch(tiny.tokens(2, 7))
  hidden = tiny.forward(params, cfg, rows).hidden
  for b in range(2):
    np.testing.assert_allclose(
        hidden[b], by_hand(params, cfg, np.asarray(rows.tokens[b])), atol=2e-5)


@pytest.mark.parametrize('stack', STACKS)
def test_only_distances_between_positions_matter(stack):
  cfg = tiny.config(**STACKS[stack])
  params = tiny.params(cfg)
  rows = tiny.batch(tiny.tokens(2, 9))
  later = rows.replace(positions=rows.positions + 20)
  np.testing.assert_allclose(
      tiny.forward(params, cfg, later).hidden, tiny.forward(params, cfg, rows).hidden, atol=2e-5)


@pytest.mark.parametrize('stack', STACKS)
def test_no_position_depends_on_a_later_token(stack):
  cfg = tiny.config(tied=False, **STACKS[stack])
  np.testing.assert_array_equal(tiny.reached(cfg, 7), np.arange(40) <= 7)


# One block of attention, and several.
@pytest.mark.parametrize('stack, length', [('attention', 20), ('attention', 140), ('mla', 140)])
def test_packed_rows_equal_separate_ones(stack, length):
  cfg = tiny.config(**STACKS[stack])
  params = tiny.params(cfg)
  cut = length // 2
  tokens, weights = tiny.tokens(1, length), draw_weights((1, length))
  packed = tiny.batch(tokens, np.where(np.arange(length) < cut, 1, 2)[None])
  apart = tiny.batch(tokens.reshape(2, cut))

  hidden, loss, grad = passes(params, cfg, packed, weights)
  apart_hidden, apart_loss, apart_grad = passes(params, cfg, apart, weights.reshape(2, cut))
  np.testing.assert_allclose(hidden.reshape(2, cut, -1), apart_hidden, atol=2e-5)
  np.testing.assert_allclose(loss, apart_loss, rtol=1e-5)
  assert_close(grad, apart_grad)


@pytest.mark.parametrize('stack, before, after', [
    ('attention', 7, 0), ('attention', 0, 7), ('attention', 3, 4), ('mla', 3, 4)])
def test_padding_changes_nothing(stack, before, after):
  cfg = tiny.config(**STACKS[stack])
  params = tiny.params(cfg)
  tokens = tiny.tokens(2, 10)
  pad = lambda x, value: np.pad(x, ((0, 0), (before, after)), constant_values=value)
  plain, padded = tiny.batch(tokens), tiny.batch(pad(tokens, 7), pad(np.ones_like(tokens), 0))
  weights = draw_weights((2, 10))
  everywhere = jnp.full((2, before + 10 + after), 3.0).at[:, before:before + 10].set(weights)

  loss, grad = loss_and_grad(params, cfg, plain, weights)
  padded_loss, padded_grad = loss_and_grad(params, cfg, padded, everywhere)
  np.testing.assert_allclose(padded_loss, loss, rtol=1e-6)
  assert_close(padded_grad, grad)


@pytest.mark.parametrize('stack, unroll, prepared', [
    ('attention', False, False), ('attention', True, False), ('attention', True, True),
    ('mla', False, False), ('mla', True, True)])
def test_prefill_and_steps_equal_forward(stack, unroll, prepared):
  cfg = tiny.config(unroll=unroll, **{'attention': tiny.FULL_STACK, 'mla': tiny.LATENT}[stack])
  params = tiny.params(cfg)
  tokens, start, prompt, length = tiny.tokens(3, 12), np.array([0, 2, 6]), 7, 15
  rows = tiny.batch(tokens, np.arange(12) >= start[:, None])
  expected = tiny.forward(params, dataclasses.replace(cfg, unroll=False), rows).hidden

  given = model.prepare(params, cfg) if prepared else params
  prefill = jax.jit(functools.partial(model.prefill, cfg=cfg, length=length))
  step = jax.jit(functools.partial(model.step, cfg=cfg))
  hidden, cache, _ = prefill(given, tokens=rows.tokens[:, :prompt], start=jnp.asarray(start))
  np.testing.assert_allclose(hidden, expected[:, prompt - 1], atol=1e-5)
  for t in range(prompt, 12):
    hidden, cache, _ = step(given, tokens=rows.tokens[:, t], cache=cache)
    np.testing.assert_allclose(hidden, expected[:, t], atol=1e-5)
  assert cache.index == 12 and cache.length == length


@pytest.mark.parametrize('unroll', [False, True])
def test_a_repeated_cache_continues_every_copy(unroll):
  cfg = tiny.config(unroll=unroll)
  params = tiny.params(cfg)
  tokens, start = jnp.asarray(tiny.tokens(2, 5)), jnp.array([0, 3])
  _, cache, _ = jax.jit(functools.partial(model.prefill, cfg=cfg, length=8))(
      params, tokens=tokens, start=start)
  step = jax.jit(functools.partial(model.step, cfg=cfg))
  next_tokens = jnp.array([1, 2, 3, 4, 5, 6])

  hidden, _, _ = step(params, tokens=next_tokens, cache=model.repeat_cache(cache, 3))
  for copy in range(3):
    alone, _, _ = step(params, tokens=next_tokens[copy::3], cache=cache)
    np.testing.assert_allclose(hidden[copy::3], alone, atol=1e-6)


def test_prepared_parameters_are_rounded_once():
  cfg = tiny.config(dtype='bfloat16', unroll=True)
  params = tiny.params(cfg)
  prepared = jax.jit(functools.partial(model.prepare, cfg=cfg))(params)
  assert prepared['blocks'][1]['0']['mixer']['q'].dtype == jnp.bfloat16
  assert prepared['embed']['table'].dtype == jnp.bfloat16
  assert prepared['norm']['scale'].dtype == jnp.float32
  tokens, start = jnp.asarray(tiny.tokens(2, 5)), jnp.array([0, 3])
  prefill = jax.jit(functools.partial(model.prefill, cfg=cfg, length=8))
  plain, _, _ = prefill(params, tokens=tokens, start=start)
  rounded, _, _ = prefill(prepared, tokens=tokens, start=start)
  np.testing.assert_array_equal(np.asarray(plain, np.float32), np.asarray(rounded, np.float32))


def test_scan_unrolled_loop_and_single_entries_are_one_model():
  cfg = tiny.config(**tiny.FULL_STACK)
  params = tiny.params(cfg)
  rows = tiny.batch(tiny.tokens(2, 10))
  weights = draw_weights((2, 10))
  loss, grad = loss_and_grad(params, cfg, rows, weights)

  unrolled_loss, unrolled_grad = loss_and_grad(
      params, dataclasses.replace(cfg, unroll=True), rows, weights)
  np.testing.assert_allclose(unrolled_loss, loss, rtol=1e-5)
  assert_close(unrolled_grad, grad)

  head_params, head_cfg = as_head(params, cfg)
  head_loss, head_grad = loss_and_grad(head_params, head_cfg, rows, weights)
  np.testing.assert_allclose(head_loss, loss, rtol=1e-5)
  assert_close(head_grad, as_head(grad, cfg)[0])


@pytest.mark.parametrize('remat, unroll', [('full', False), ('dots', False), ('full', True)])
def test_what_is_recomputed_changes_no_gradient(remat, unroll):
  cfg = tiny.config()
  params = tiny.params(cfg)
  rows, weights = tiny.batch(tiny.tokens(2, 10)), draw_weights((2, 10))
  loss, grad = loss_and_grad(params, cfg, rows, weights)
  other_loss, other_grad = loss_and_grad(
      params, dataclasses.replace(cfg, remat=remat, unroll=unroll), rows, weights)
  np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
  assert_close(other_grad, grad)


def test_remat_keeps_less():
  def kept(remat):
    cfg = tiny.config(remat=remat)
    rows = jax.eval_shape(lambda: tiny.batch(tiny.tokens(4, 32)))
    params = param.abstract(model.specs(cfg))
    weights = jax.ShapeDtypeStruct((4, 32), jnp.float32)
    forward = lambda p, b, w: jax.vjp(lambda p: jnp.sum(w * model.forward(
        p, cfg, b.tokens, b.positions, b.segments).hidden[..., 0]), p)[1]
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(forward, params, rows, weights)))
  full, dots, none = kept('full'), kept('dots'), kept('none')
  assert full < 0.8 * dots < 0.8 * none


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_gradients():
  cfg = tiny.config(dtype='bfloat16', tied=False)
  params = tiny.params(cfg)
  rows, weights = tiny.batch(tiny.tokens(4, 20)), draw_weights((4, 20))
  hidden, loss, grad = passes(params, cfg, rows, weights)
  assert hidden.dtype == jnp.bfloat16
  exact_loss, exact_grad = loss_and_grad(
      params, dataclasses.replace(cfg, dtype='float32'), rows, weights)
  np.testing.assert_allclose(loss, exact_loss, rtol=0.02)
  for name, g in param.flat(grad).items():
    assert g.dtype == jnp.float32
    # Products; the others are sums of rounded terms.
    if name != 'embed/table' and g.ndim > 1 and 'norm' not in name:
      assert np.any(np.asarray(g) != np.asarray(g.astype(jnp.bfloat16).astype(jnp.float32))), name
    e = np.asarray(param.flat(exact_grad)[name])
    assert np.linalg.norm(g - e) < 0.1 * np.linalg.norm(e), name


@pytest.mark.parametrize('changes, match', [
    (dict(pattern=('mamba',)), "unknown mixer 'mamba'; known are"),
    (dict(ffn='mamba'), "unknown FFN 'mamba'; known are"),
])
def test_unknown_layers_are_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    model.specs(tiny.config(**changes))


def test_rows_longer_than_the_model_are_refused():
  cfg = tiny.config(max_length=8)
  params = param.abstract(model.specs(cfg))
  rows = jax.ShapeDtypeStruct((1, 9), jnp.int32)
  with pytest.raises(ValueError, match='9 tokens are longer than model.max_length, 8'):
    jax.eval_shape(lambda p, r: model.forward(p, cfg, r, r, r), params, rows)
  start = jax.ShapeDtypeStruct((1,), jnp.int32)
  for length, match in ((9, '9 tokens are longer'), (8, '9 slots does not fit')):
    with pytest.raises(ValueError, match=match):
      jax.eval_shape(
          lambda p, r, s, n=length: model.prefill(p, cfg, r[:, :9 if n == 8 else 4], s, n),
          params, rows, start)


def test_what_layers_report_is_collected_by_index_and_name(monkeypatch):
  class Reporting:
    """An FFN that says what it saw."""
    specs, flops = staticmethod(block.FFNS['mlp'].specs), staticmethod(block.FFNS['mlp'].flops)

    @staticmethod
    def apply(params, cfg, x, segments):
      y, _ = block.FFNS['mlp'].apply(params, cfg, x, segments)
      size = jnp.sum(params['gate'])
      return y, {'aux_loss': {'balance': size}, 'metrics': {'size': size},
                 'routes': segments[..., None]}

  monkeypatch.setitem(block.FFNS, 'reporting', Reporting)
  for unroll in (False, True):
    cfg = tiny.config(pattern=('attention', ('attention', 'reporting')), unroll=unroll)
    params = tiny.params(cfg)
    rows = tiny.batch(tiny.tokens(2, 6))
    out = tiny.forward(params, cfg, rows)
    sizes = jnp.sum(params['blocks']['1']['ffn']['gate'], axis=(1, 2))
    np.testing.assert_allclose(out.aux_loss['balance'], sizes.sum(), rtol=1e-5)
    np.testing.assert_allclose(out.metrics['size'], sizes.mean(), rtol=1e-5)
    assert out.routes.keys() == {2, 4}
    np.testing.assert_array_equal(out.routes[4], rows.segments[..., None])


def test_flops_by_hand():
  cfg = ModelConfig(
      vocab_size=10, embed_dim=6, num_heads=4, num_kv_heads=2, head_dim=2, ffw_dim=5, repeats=3)
  projections = 2 * 6 * (8 + 4 + 4 + 8)  # q, k, v, o
  scores = 2 * 2 * 8 * 20 // 2           # queries by keys, weights by values, half of 20 positions
  assert model.flops(cfg, 20) == 3 * (3 * (projections + scores + 2 * 3 * 6 * 5) + 2 * 6 * 10)


def test_flops_are_what_the_compiler_counts():
  cfg = tiny.config(
      vocab_size=256, embed_dim=128, num_heads=4, head_dim=32, ffw_dim=256, unroll=True,
      attention='reference')
  rows = jax.eval_shape(lambda: tiny.batch(tiny.tokens(4, 16)))
  weights = jax.ShapeDtypeStruct((4, 16), jnp.float32)
  counted = passes.lower(
      param.abstract(model.specs(cfg)), cfg, rows, weights).cost_analysis()['flops']
  # The compiler adds elementwise work, the reference's upper triangle, and the logits computed
  # again backward.
  assert 1.0 < counted / (4 * 16 * model.flops(cfg, 16)) < 1.12
