"""Latent attention: by hand, on a mesh, what it keeps. What attention has, too: test_model."""

import dataclasses

import jax
import jax.numpy as jnp
import nn_tiny as tiny
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nn import mla, model, param
from nn.config import MLA, Rope


def by_hand(p, cfg, x):
  """One row [T, D] in float64, a head and a position at a time."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
  x, m = np.asarray(x, np.float64), cfg.mla_sizes

  def rms(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + cfg.mla.norm_eps) * scale

  def turn(x, t):
    if not cfg.rope_theta:
      return x
    half = len(x) // 2
    first, second = (x[::2], x[1::2]) if cfg.mla.interleaved else (x[:half], x[half:])
    pair = (first + 1j * second) * np.exp(1j * t * cfg.rope_theta ** (-np.arange(half) / half))
    return np.concatenate([pair.real, pair.imag])

  low = rms(x @ p['q_down'], p['q_norm']) if 'q_down' in p else x
  latent = rms(x @ p['kv_down'], p['kv_norm'])
  out = np.zeros_like(x)
  for h in range(cfg.num_heads):
    q = low @ p['q_up' if 'q_down' in p else 'q'][:, h]
    k, v = latent @ p['k_up'][:, h], latent @ p['v_up'][:, h]
    for t in range(len(x)):
      scores = k[:t + 1] @ q[t, :m.nope_dim]
      if m.rope_dim:
        scores += [turn(q[t, m.nope_dim:], t) @ turn(x[s] @ p['k_shared'], s) for s in range(t + 1)]
      weights = np.exp(scores / np.sqrt(m.nope_dim + m.rope_dim))
      out[t] += weights / weights.sum() @ v[:t + 1] @ p['o'][h]
  return out


@pytest.mark.parametrize('changes', [
    {}, {'interleaved': True, 'rope_dim': 6}, {'rope_theta': 0.0, 'rope_dim': 3, 'q_rank': 0},
    {'rope_dim': 0}, {'norm_eps': 0.5, 'value_dim': 3}], ids=str)
def test_layer_and_its_steps_match_plain_numpy(changes):
  """The steps take the absorbed form, from an empty cache."""
  sizes = {k: v for k, v in changes.items() if k != 'rope_theta'}
  latent = dataclasses.replace(tiny.LATENT['mla'], **sizes)
  cfg = tiny.config(**tiny.LATENT | {'mla': latent}, rope_theta=changes.get('rope_theta', 100.0))
  params = tiny.params(cfg)['head']['0']['mixer']
  x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 6, 16)), jnp.float32)
  expected = by_hand(params, cfg, x[0])
  y = jax.jit(mla.apply, static_argnums=1)(
      params, cfg, x, jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32))
  np.testing.assert_allclose(y[0], expected, atol=2e-5)
  state, step = mla.init_cache(cfg, 1, 8), jax.jit(mla.step, static_argnums=1)
  for t in range(6):
    valid = (jnp.arange(8) <= t)[None]
    y, state = step(params, cfg, x[:, t], jnp.array([t]), valid, t, state, None)
    np.testing.assert_allclose(y[0], expected[t], atol=2e-5)


def test_yarn_scales_every_channel_by_its_gain():
  """With equal weights the turned channels have no gain of their own, and all scores have both."""
  scaling = Rope(kind='yarn', factor=8.0, length=16, mscale=0.5, mscale_all_dim=0.5)
  gain = 0.1 * 0.5 * np.log(8) + 1
  np.testing.assert_allclose(scaling.latent_gain, gain)
  np.testing.assert_allclose(scaling.attention_gain, 1)
  cfg = tiny.config(**tiny.LATENT, rope=scaling)
  louder = dataclasses.replace(
      cfg, rope=dataclasses.replace(scaling, mscale=0.0, mscale_all_dim=0.0, gain=1.0))
  params = tiny.params(cfg)['head']['0']['mixer']
  x, ones = jnp.asarray(tiny.params(cfg)['embed']['table'][None, :9]), jnp.ones((1, 9), jnp.int32)
  apply = lambda params, cfg: jax.jit(mla.apply, static_argnums=1)(
      params, cfg, x, jnp.arange(9)[None], ones)
  np.testing.assert_allclose(
      apply(params, cfg), apply(params | {'q_up': params['q_up'] * gain**2}, louder), atol=1e-5)


def test_sizes_follow_the_ratios_of_the_paper_and_the_cache_holds_latents_only():
  cfg = tiny.config(head=('mla',), repeats=0, head_dim=8, dtype='bfloat16')
  assert cfg.mla_sizes == (32, 8, 4, 8)
  state = mla.init_cache(cfg, 3, 10)
  assert {name: a.shape for name, a in state.items()} == {'latent': (3, 10, 32 + 4)}


def test_flops_by_hand():
  cfg = tiny.config(**tiny.LATENT)
  queries = 16 * 5 + 5 * 4 * (4 + 2)     # down and up
  keys = 16 * 7 + 16 * 2 + 7 * 4 * (4 + 6)
  assert mla.flops(cfg, 20) == 2 * (queries + keys + 4 * 6 * 16) + 2 * 4 * (4 + 2 + 6) * 20 // 2


def test_a_mesh_computes_what_one_device_does():
  cfg = tiny.config(**tiny.LATENT)
  params, tokens = tiny.params(cfg), jnp.asarray(tiny.tokens(8, 6))
  rows, start = tiny.batch(tokens), jnp.arange(8) // 2

  def run(params, rows, start):
    def total(params):
      return jnp.sum(tiny.forward(params, cfg, rows).hidden[..., 0] ** 2)
    hidden, cache, _ = model.prefill(params, cfg, rows.tokens[:, :5], start, 9)
    hidden, cache, _ = model.step(params, cfg, rows.tokens[:, 5], cache)
    return jax.grad(total)(params), hidden, cache

  grads, hidden, _ = jax.jit(run)(params, rows, start)
  mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'model'), axis_types=(AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    given = jax.device_put(params, param.shardings(model.specs(cfg), mesh, dict(cfg.rules)))
    put = lambda x: jax.device_put(
        x, NamedSharding(mesh, PartitionSpec(('data', 'fsdp')) if x.ndim else PartitionSpec()))
    split_grads, split_hidden, cache = jax.jit(run)(given, *jax.tree.map(put, (rows, start)))
  np.testing.assert_allclose(split_hidden, hidden, atol=2e-5)
  for name, e in param.flat(grads).items():
    np.testing.assert_allclose(
        param.flat(split_grads)[name], e, rtol=0, atol=3e-5 * np.abs(e).max(), err_msg=name)
  latent = cache.layers['head']['0']['latent']
  assert latent.sharding.is_equivalent_to(
      NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))), latent.ndim)


@pytest.mark.parametrize('changes, message', [
    (dict(mla=MLA(rope_dim=3)), 'model.mla.rope_dim is 3; rotary embedding needs an even size'),
    (dict(head=('attention',), pattern=('attention',)), 'no layer has the mixer mla')])
def test_options_that_cannot_be_meant_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny.config(**tiny.LATENT | changes)
  for name in ('kv_rank', 'rope_dim'):
    with pytest.raises(ValueError, match=f'model.mla.{name} is -2'):
      MLA(**{name: -2})
