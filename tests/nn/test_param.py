"""The table of parameters: initial values, where arrays go, and what people are told about it."""

import dataclasses

import jax
import jax.numpy as jnp
import nn_tiny as tiny
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from nn import model, param
from nn.param import Spec


def mesh(**axes):
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes),
                       devices=jax.devices()[:int(np.prod(list(axes.values())))])


def test_initial_values_do_not_depend_on_the_mesh():
  cfg = tiny.config()
  specs = model.specs(cfg)
  alone = jax.jit(model.init, static_argnums=1)(jax.random.key(7), cfg)
  for axes in (dict(data=2, fsdp=2, model=2), dict(fsdp=8)):
    shardings = param.shardings(specs, mesh(**axes), dict(cfg.rules))
    split = jax.jit(model.init, static_argnums=1, out_shardings=shardings)(jax.random.key(7), cfg)
    for name, a in param.flat(split).items():
      assert a.sharding == param.flat(shardings)[name]
      np.testing.assert_array_equal(a, param.flat(alone)[name], err_msg=name)


def test_a_new_parameter_leaves_the_others_as_they_were():
  cfg = tiny.config(qk_norm=False)
  plain = param.flat(model.init(jax.random.key(7), cfg))
  more = param.flat(model.init(
      jax.random.key(7), dataclasses.replace(cfg, qk_norm=True, tied=False)))
  assert more.keys() - plain.keys() == {
      'unembed/table',
      *(f'{part}/0/mixer/{name}_norm/scale' for part in ('head', 'blocks') for name in 'qk')}
  for name, a in plain.items():
    np.testing.assert_array_equal(a, more[name], err_msg=name)


def test_initial_sizes_keep_a_signal_s_scale():
  cfg = tiny.config(embed_dim=256, num_heads=8, num_kv_heads=4, head_dim=32, ffw_dim=768)
  params = model.init(jax.random.key(0), cfg)
  layer = params['head']['0']
  for a, stddev in [
      (params['embed']['table'], 0.02), (layer['mixer']['q'], 1 / 16), (layer['ffn']['up'], 1 / 16),
      (layer['mixer']['o'], 1 / 16 / 6**0.5), (layer['ffn']['down'], 768**-0.5 / 6**0.5)]:
    np.testing.assert_allclose(jnp.std(a), stddev, rtol=0.03)
  stacked = params['blocks']['0']['mixer']['q']
  assert stacked.shape[0] == 2 and np.all(np.asarray(stacked[0]) != np.asarray(stacked[1]))


def test_where_the_axes_of_an_array_go():
  rules = dict(tiny.config().rules)
  spec = Spec(
      (2, 16, 4, 4), ('layers', 'embed', 'heads', 'head_dim'), param.ones, contract=('embed',))
  spread = lambda **axes: param.partition_spec(spec, mesh(**axes), rules)
  assert spread(data=2, fsdp=2, model=2) == PartitionSpec(None, 'fsdp', 'model', None)
  assert spread(data=8) == PartitionSpec(None, None, None, None)
  assert param.partition_spec(
      spec, mesh(data=2, fsdp=2), rules | {'embed': ('data', 'fsdp')}) == PartitionSpec(
          None, ('data', 'fsdp'), None, None)
  with pytest.raises(ValueError, match="w: axis 'heads' of size 4 cannot be split 8 ways"):
    param.partition_spec(spec, mesh(model=8), rules, 'w')
  with pytest.raises(KeyError, match="no sharding rule for axis 'heads'"):
    param.partition_spec(spec, mesh(model=2), {'layers': (), 'embed': ()})
  with pytest.raises(ValueError, match=r"mesh axes \['model'\] used twice"):
    param.partition_spec(spec, mesh(model=2), rules | {'embed': ('model',)})


def test_counts_and_bytes():
  specs = {'a': {'w': Spec((6, 4), ('embed', 'ffw'), param.ones)},
           'b': Spec((4,), ('ffw',), param.ones)}
  assert param.count(specs) == 28
  rules = {'embed': ('fsdp',), 'ffw': ('model',)}
  assert param.bytes_per_device(specs, mesh(data=2, fsdp=2, model=2), rules) == 4 * (6 + 2)


def test_overview_names_groups_and_adds_up():
  specs = {'a': {'w': Spec((6, 4), ('embed', 'ffw'), param.ones),
                 'u': Spec((3,), ('ffw',), param.ones)},
           'c': {'d': {'x': Spec((2,), ('ffw',), param.ones),
                       'y': Spec((1, 1), ('embed', 'ffw'), param.ones)}}}
  assert param.overview(specs).splitlines() == [
      'parameters  arrays  scalars   share',
      'a/w              1       24   80.0%',
      'a/u              1        3   10.0%',
      'c/d              2        3   10.0%',
      'total            4       30  100.0%',
  ]


def test_constraints_follow_rules_and_divisibility():
  rules = tiny.config().rules
  x = jnp.ones((8, 4, 6))
  assert param.constrain(x, rules, 'batch', 'time', 'ffw') is x        # no mesh
  place = jax.jit(lambda x: param.constrain(x, rules, 'batch', None, 'ffw'))
  with jax.set_mesh(mesh(data=2, fsdp=2, model=2)):
    assert place(x).sharding.spec == PartitionSpec(('data', 'fsdp'), None, 'model')
    assert place(x[:1]).sharding.is_equivalent_to(
        jax.NamedSharding(jax.sharding.get_mesh(), PartitionSpec(None, None, 'model')), 3)
    assert param.ways(rules, 'batch', 8) == 4 and param.ways(rules, 'batch', 6) == 1
    with pytest.raises(ValueError):
      param.constrain(x, rules, 'batch', 'time')


def test_split_and_merge_take_frozen_arrays_apart():
  frozen = Spec((2,), ('ffw',), param.zeros, trainable=False)
  specs = {'a': {'w': Spec((2,), ('ffw',), param.ones), 'bias': frozen}, 'b': {'bias': frozen}}
  tree = param.init(jax.random.key(0), specs)
  trainable, rest = param.split(tree, specs)
  assert param.flat(trainable).keys() == {'a/w'} and param.flat(rest).keys() == {'a/bias', 'b/bias'}
  assert jax.tree.structure(param.merge(trainable, rest)) == jax.tree.structure(tree)
