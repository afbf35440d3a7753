"""Buffers of the expert axis that do not hold everything: which rows are dropped, and what is left.

The reference drops by going around, one row of every expert at a time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from moe import dispatch, layer
from nn import param
from nn.config import MoE
from tests.moe import moe_tiny as tiny

MESHES = {'two': dict(expert=2), 'four': dict(expert=4), 'groups of two': dict(data=2, expert=2)}


def on(axes):
  """The mesh of these axes as the ambient one."""
  return jax.set_mesh(jax.make_mesh(
      tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)))


def config(buffer):
  """Without the auxiliary losses, which drops do not change."""
  return tiny.config(MoE(experts=tiny.EXPERTS, top_k=2, ffw_dim=12, buffer=buffer))


def skewed(params, share):
  """The router leans towards the first experts."""
  lean = jnp.asarray(np.linspace(share, 0, tiny.EXPERTS), jnp.float32)
  return params | {'router': params['router'].at[0].add(lean)}


def rows():
  """The first channel is positive, for `skewed`."""
  x, segments = tiny.rows()
  return x.at[..., 0].set(jnp.abs(x[..., 0]) + 0.5), segments


def around(wanted, room):
  """What every expert of a device gets: one row each in turn, while there is room and demand."""
  given = np.zeros_like(wanted)
  while given.sum() < min(room, wanted.sum()):
    for e in range(len(wanted)):
      given[e] += given[e] < wanted[e] and given.sum() < room
  return given


def kept_by_hand(routes, axes, room):
  """[B, T, E] bool: false where a choice is dropped. routes: [B, T, K], -1 at padding."""
  kept = np.ones((*routes.shape[:2], tiny.EXPERTS), bool)
  ways, groups = axes['expert'], axes.get('data', 1)
  held = tiny.EXPERTS // ways
  for group in np.split(np.arange(len(routes)), groups):
    wanted = np.bincount(routes[group][routes[group] >= 0], minlength=tiny.EXPERTS)
    for device in range(ways):
      mine = slice(device * held, (device + 1) * held)
      quota = around(wanted[mine], room)
      for e in range(held):
        places = np.argwhere((routes[group] == mine.start + e).any(-1))       # in token order
        for b, t in places[quota[e]:]:
          kept[group[b], t, mine.start + e] = False
  return kept


def assert_close(actual, expected, rtol=2e-5):
  """Every leaf to rtol of its largest entry."""
  for (path, e), a in zip(
      jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True):
    np.testing.assert_allclose(a, e, rtol=0, atol=rtol * np.abs(e).max() + 1e-12, err_msg=str(path))


def test_a_device_is_filled_evenly_and_by_token_order():
  # Of three experts with 10, 2 and 6 rows 11 fit: 5, 2 and 4, the odd one the first one's.
  np.testing.assert_array_equal(dispatch.level(jnp.array([10, 2, 6]), 11), [5, 2, 4])
  # From two devices to two with two experts each, and room for 8: the first device's rows are
  # first, and what the other one gets is less than it has room for.
  counts = jnp.array([[[4, 1], [1, 0]], [[6, 1], [2, 3]]])
  np.testing.assert_array_equal(
      dispatch.fit(counts, 8), [[[4, 1], [1, 0]], [[2, 1], [2, 3]]])


def test_what_fits_is_what_going_around_gives():
  rng = np.random.default_rng(0)
  level = jax.jit(dispatch.level)
  for case in range(200):
    wanted = rng.integers(0, rng.choice([2, 5, 30]), 6)
    room = int(rng.integers(0, wanted.sum() + 3))
    np.testing.assert_array_equal(level(wanted, room), around(wanted, room), err_msg=str(case))


def test_room_is_a_multiple_of_the_even_share_up_to_everything():
  assert [dispatch.capacity(factor, 24, 4) for factor in (0, 1, 1.25, 2.1, 4, 9)] == [
      96, 24, 32, 56, 96, 96]


@pytest.mark.parametrize('mesh, share', [('two', 0.2), ('four', 0.0)])
def test_a_buffer_that_holds_everything_changes_nothing(mesh, share):
  """Smaller than the worst case, and enough for what comes."""
  whole, x, segments = config(0.0), *rows()
  params = skewed(tiny.params(whole), share)
  with on(MESHES[mesh]):
    expected = tiny.pull(params, whole, x, segments)
    (loss, (y, extras)), grads = tiny.pull(params, config(1.5), x, segments)
  assert extras.pop('dropped') == 0
  assert_close(((loss, (y, extras)), grads), expected)


@pytest.mark.parametrize('mesh, factor', [('four', 1.25), ('groups of two', 1.0)])
def test_rows_without_room_are_choices_with_gate_zero(mesh, factor):
  cfg, (x, segments), axes = config(factor), rows(), MESHES[mesh]
  params = skewed(tiny.params(cfg), 12.0)
  with on(axes):
    (_, (y, extras)), (grads, dx) = tiny.pull(params, cfg, x, segments)
  room = dispatch.capacity(factor, x.shape[0] * x.shape[1] * 2 // np.prod(list(axes.values())), 9)
  chosen = tiny.chosen_by_hand(params, cfg, x, segments)
  kept = kept_by_hand(np.asarray(extras['routes']), axes, room)
  dropped = (chosen & ~kept).sum()
  assert extras['dropped'] == dropped and dropped > 8
  np.testing.assert_array_equal(extras['load'], chosen.sum((0, 1)))          # of all choices
  # Some tokens lose one of their two experts, which leaves the gate of the other one as it is.
  assert ((chosen & kept).sum(-1) == 1).any()
  np.testing.assert_allclose(y, tiny.dense(params, cfg, x, chosen, kept), atol=1e-5)

  def loss(trainable, x):
    y = tiny.dense(params | trainable, cfg, x, chosen, kept)
    return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y)

  expected, by_x = jax.grad(loss, (0, 1))(param.split(params, layer.specs(cfg))[0], x)
  assert_close(grads, expected)
  assert_close(dx, by_x)


def ragged_all_to_all(rows, buffer, begin, sizes, target, arriving, *, axis_name):
  """What jax documents of the one that CPUs do not have: everybody writes at everybody's target."""
  me, place = jax.lax.axis_index(axis_name), jnp.arange(len(buffer))
  rows, begin, sizes, target = (
      jax.lax.all_gather(a, axis_name) for a in (rows, begin, sizes, target))
  for sender in range(len(rows)):
    at = place - target[sender, me]
    here = (at >= 0) & (at < sizes[sender, me])
    moved = jnp.take(rows[sender], begin[sender, me] + at, axis=0, mode='clip')
    buffer = jnp.where(here[:, None], moved, buffer)
  return buffer


@pytest.mark.parametrize('lanes, after', [
    ([[2, 0, 1], [0, 0, 3], [1, 4, 0]], 5), ([[0, 6, 0], [0, 6, 0], [0, 6, 0]], 18)])
def test_both_ways_over_the_axis_are_one(monkeypatch, lanes, after):
  """What accelerators do, by its documentation, and what a CPU does."""
  lanes, road = np.array(lanes), dispatch.Road('expert', 6, after)
  sent = np.arange(1, 19.0).reshape(3, 6, 1)
  expected = np.zeros((3, after, 1))
  for to in range(3):
    parts = [sent[i][lanes[i, :to].sum():lanes[i, :to + 1].sum()] for i in range(3)]
    expected[to, :lanes[:, to].sum()] = np.concatenate(parts)
  spec = PartitionSpec('expert')

  def there_and_back(rows):
    there = dispatch.send(road, rows, jnp.asarray(lanes))
    return there, dispatch.send(road.back, there, jnp.asarray(lanes).T)

  for platform in ('cpu', 'tpu'):
    monkeypatch.setattr(dispatch, 'platform', lambda platform=platform: platform)
    calls = []
    monkeypatch.setattr(jax.lax, 'ragged_all_to_all', lambda *args, calls=calls, **axis: (
        calls.append(args), ragged_all_to_all(*args, **axis))[1])
    with on(dict(expert=3)):
      run = jax.shard_map(there_and_back, in_specs=spec, out_specs=(spec, spec), check_vma=False)
      rows = jnp.asarray(sent.reshape(18, 1), jnp.float32)
      (there, back), pull = jax.vjp(jax.jit(lambda x, run=run: run(x)), rows)
      reverse, = jax.jit(pull)((jnp.asarray(expected).reshape(there.shape), jnp.zeros_like(back)))
    assert bool(calls) == (platform == 'tpu')
    np.testing.assert_array_equal(there.reshape(expected.shape), expected)
    travelled = np.arange(6) < lanes.sum(1)[:, None]
    for found in (back, reverse):
      np.testing.assert_array_equal(found.reshape(3, 6), np.where(travelled, sent[..., 0], 0))


@pytest.mark.parametrize('make, match', [
    (lambda: MoE(buffer=0.5), 'model.moe.buffer is 0.5, wanted at least 1'),
    (lambda: MoE(buffer=float('nan')), 'model.moe.buffer is nan, wanted at least 1'),
    (lambda: MoE(buffer=1.5, dispatch='global'), "no effect where model.moe.dispatch is 'global'"),
])
def test_buffers_that_cannot_be_are_refused(make, match):
  with pytest.raises(ValueError, match=match):
    make()


@pytest.mark.parametrize('axes', [{}, dict(data=2), dict(model=2)])
def test_without_an_expert_axis_a_buffer_is_refused(axes):
  cfg, (x, segments) = config(1.25), rows()
  call = functools.partial(tiny.pull, tiny.params(cfg), cfg, x, segments)
  with pytest.raises(ValueError, match=r'buffer is 1.25, but no rows travel .* set mesh.expert'):
    if not axes:
      call()
    with on(axes):
      call()


def test_rows_that_no_device_has_alone_are_not_dropped():
  """One row for four devices: every device has it, and does its experts' share."""
  cfg, (x, segments) = config(1.0), rows()
  params, one = skewed(tiny.params(cfg), 4.0), (x[:1], segments[:1])
  whole = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, buffer=0.0))
  expected = tiny.pull(params, whole, *one)[0][1][0]
  with on(dict(expert=4)):
    y, extras = tiny.pull(params, cfg, *one)[0][1]
  assert extras['dropped'] == 0
  np.testing.assert_allclose(y, expected, atol=1e-5)
