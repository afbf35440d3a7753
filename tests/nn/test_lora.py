"""Adapters: the model they begin as, the gradients they get, what stays, and where they may not be.

R rank, s scale.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import nn_tiny as tiny
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nn import linear, lora, model, param, score
from nn.config import GDN, LoRA, MoE
from nn.types import LOGP

LORA, SCALE = LoRA(rank=2, alpha=3.0), 1.5
MOE = MoE(experts=4, top_k=2, ffw_dim=8, shared_dim=8, bias_rate=0.01)
# A layer that stands alone and two under the scan.
EXPERTS = tiny.config(num_kv_heads=4, pattern=(('attention', 'moe'),), moe=MOE)
HYBRID = tiny.config(pattern=('gdn',), gdn=GDN(variant='kda', chunk=16))


merge = jax.jit(lora.merge, static_argnums=1)


def with_adapters(cfg):
  return dataclasses.replace(cfg, lora=LORA)


@functools.cache
def example(cfg):
  """Parameters with adapters that are not 0, and rows with padding and two documents."""
  segments = np.where(np.arange(9) < 4, 1, 2) * (np.arange(9) < 2 + np.arange(8)[:, None])
  return tiny.params(with_adapters(cfg)), tiny.batch(tiny.tokens(8, 9), segments)


def loss(params, cfg, rows):
  out = model.forward(params, cfg, rows.tokens, rows.positions, rows.segments)
  weights = jnp.cos(jnp.arange(rows.tokens.size)).reshape(rows.tokens.shape)
  return jnp.sum(weights * score.score(params, cfg, out, rows, (LOGP,))[LOGP])


@functools.partial(jax.jit, static_argnums=1)
def pull(params, cfg, rows):
  """Loss, and gradients of what is trained."""
  trainable, frozen = param.split(params, model.specs(cfg))
  return jax.value_and_grad(lambda t: loss(param.merge(t, frozen), cfg, rows))(trainable)


def test_every_matrix_of_a_layer_has_its_two():
  specs = model.specs(with_adapters(EXPERTS))
  table, small = param.flat(model.specs(EXPERTS)), param.flat(specs['lora'])
  matrices = {name for name, spec in table.items() if spec.contract}
  assert {name.rpartition('/')[0] for name in small} == matrices and len(matrices) == 17
  assert small['head/0/mixer/q/a'].shape == (16, 2) and small['head/0/mixer/q/b'].shape == (2, 4, 4)
  assert small['head/0/mixer/o/a'].shape == (4, 4, 2) and small['head/0/mixer/o/b'].shape == (2, 16)
  down = small['blocks/0/ffn/down/a'], small['blocks/0/ffn/down/b']
  assert [s.shape for s in down] == [(2, 4, 8, 2), (2, 4, 2, 16)]
  assert [s.axes for s in down] == [('layers', 'expert', 'ffw', 'adapter'),
                                    ('layers', 'expert', 'adapter', 'embed')]
  trained, _ = param.split(specs, specs)
  assert trained.keys() == {'lora'}


def test_training_begins_with_the_model_as_it_was():
  plain = tiny.config(head=(), num_kv_heads=4, ffw_dim=16)
  init = jax.jit(model.init, static_argnums=1)
  base, params = init(jax.random.key(3), plain), init(jax.random.key(3), with_adapters(plain))
  merged = param.flat(merge(params, LORA))
  for name, x in param.flat(base).items():
    np.testing.assert_array_equal(merged.pop(name), x, err_msg=name)
  assert not merged
  for name, a in param.flat(params['lora']).items():
    if name.endswith('/a'):            # PEFT's law: evenly within 1 / sqrt(inputs)
      assert 0.8 * 16**-0.5 < np.abs(a).max() <= 16**-0.5, name


def test_gradients_are_those_through_the_merged_matrices():
  params, rows = example(EXPERTS)
  value, grads = pull(params, with_adapters(EXPERTS), rows)
  expected, whole = pull(merge(params, LORA), EXPERTS, rows)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  small, arrays = param.flat(grads['lora']), param.flat(params['lora'])
  for name, dw in param.flat(whole).items():
    if f'{name}/a' not in small:
      continue
    a, b = arrays[f'{name}/a'], arrays[f'{name}/b']
    lead = 'le'[:a.ndim + b.ndim - dw.ndim - 2]
    ins, outs = 'ij'[:a.ndim - len(lead) - 1], 'op'[:b.ndim - len(lead) - 1]
    da = SCALE * jnp.einsum(f'{lead}{ins}{outs},{lead}r{outs}->{lead}{ins}r', dw, b)
    db = SCALE * jnp.einsum(f'{lead}{ins}{outs},{lead}{ins}r->{lead}r{outs}', dw, a)
    for part, wanted in (('a', da), ('b', db)):
      np.testing.assert_allclose(
          small[f'{name}/{part}'], wanted, atol=5e-5 * np.abs(wanted).max(), err_msg=name)


def scan_outputs(jaxpr):
  """Shapes of all that scans put out, wherever in a program."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'scan':
      yield from (v.aval.shape for v in eqn.outvars)
    for inner in core.jaxprs_in_params(eqn.params):
      yield from scan_outputs(inner)


def test_no_matrix_is_kept_or_has_a_gradient():
  plain = tiny.config(head=(), num_kv_heads=4)
  gate, rows = (2, 16, 24), example(EXPERTS)[1]
  found = lambda cfg: gate in scan_outputs(
      jax.make_jaxpr(lambda p: pull(p, cfg, rows))(tiny.params(cfg)).jaxpr)
  assert found(plain) and not found(with_adapters(plain))


def test_a_low_precision_product_is_that_of_the_merged_matrix():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  w = linear.Adapted(draw(16, 4, 4), draw(16, 2), draw(2, 4, 4), 1e-3)
  x = draw(3, 5, 16).astype(jnp.bfloat16)
  np.testing.assert_array_equal(linear.linear(x, w), linear.linear(x, w.merged()))
  assert (linear.linear(x, w) != linear.linear(x, w.w)).any()


def test_selection_biases_stay():
  params, cfg = example(EXPERTS)[0], with_adapters(EXPERTS)
  load = {1: jnp.arange(4), 2: jnp.arange(4)}
  moved = lambda c: not np.array_equal(
      model.after_update(params, c, load)['blocks']['0']['ffn']['bias'],
      params['blocks']['0']['ffn']['bias'])
  assert moved(EXPERTS) and not moved(cfg)


def test_a_recurrence_a_token_at_a_time_is_the_merged_model():
  """Whole rows, rows in pieces with and without `prepare`, and the model without adapters."""
  cfg, (params, rows) = with_adapters(HYBRID), example(HYBRID)

  @jax.jit
  def decode(params):
    hidden, cache, _ = model.prefill(params, cfg, rows.tokens[:, :8], jnp.zeros(8, jnp.int32), 9)
    return jnp.stack([hidden, model.step(params, cfg, rows.tokens[:, 8], cache)[0]], axis=1)

  rows = tiny.batch(rows.tokens)
  merged = merge(params, LORA)
  prepared = jax.jit(model.prepare, static_argnums=1)(params, cfg)
  assert jax.tree.structure(merged) == jax.tree.structure(model.specs(HYBRID))
  hidden = tiny.forward(params, cfg, rows).hidden
  for other in (decode(params), decode(prepared), tiny.forward(merged, HYBRID, rows).hidden):
    np.testing.assert_allclose(other[:, -2:], hidden[:, -2:], atol=2e-5)


def test_gradients_on_a_mesh_equal_one_device():
  params, rows = example(EXPERTS)
  cfg = with_adapters(EXPERTS)
  expected, grads = pull(params, cfg, rows)
  mesh = jax.make_mesh((2, 2, 2), ('fsdp', 'expert', 'model'), axis_types=(AxisType.Auto,) * 3)
  put = lambda x: jax.device_put(
      x, NamedSharding(mesh, PartitionSpec(('fsdp', 'expert')) if x.ndim else PartitionSpec()))
  with jax.set_mesh(mesh):
    where = param.shardings(model.specs(cfg), mesh, dict(cfg.rules))
    value, split = pull(jax.device_put(params, where), cfg, jax.tree.map(put, rows))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for name, x in param.flat(split).items():
    wanted = np.asarray(param.flat(grads)[name])
    np.testing.assert_allclose(x, wanted, atol=5e-5 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize('cfg, changes, message', [
    (HYBRID, dict(targets=('*/mixer/*', '*/query')), "'*/query' means no parameter"),
    (HYBRID, dict(targets=('embed/*',)),
     "'embed/*' means embed/table, which is no matrix of a layer"),
    (EXPERTS, dict(targets=('*/router',)), 'blocks/0/ffn/router, which is no matrix of a layer'),
    (HYBRID, dict(rank=5), 'rank is 5, more than blocks/0/mixer/beta can have, a matrix of 16 x 4'),
])
def test_what_cannot_be_adapted_is_refused(cfg, changes, message):
  with pytest.raises(ValueError) as error:
    lora.specs(model.specs(cfg), LoRA(**dict(rank=2) | changes))
  assert message in str(error.value)


@pytest.mark.parametrize('fields, message', [
    (dict(rank=-1), 'rank is -1'),
    (dict(rank=2, alpha=0.0), 'alpha is 0.0'),
    (dict(rank=2, targets=()), 'targets is empty'),
])
def test_settings_that_mean_nothing_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    LoRA(**fields)
  with pytest.raises(ValueError, match='rank is 0: there are no adapters'):
    tiny.config(lora=LoRA(alpha=3.0))


def test_targets_are_patterns_and_scales_follow_the_rank():
  names = lora.targets(model.specs(EXPERTS), LoRA(rank=1, targets=('head/*/q', '*/shared/up')))
  assert names == ['head/0/mixer/q', 'blocks/0/ffn/shared/up']
  assert LoRA(rank=4, alpha=8.0).scale == 2 and LoRA(rank=4, alpha=8.0, rslora=True).scale == 4
