"""Rows of tokens to the experts and back: on a device, and between those of the expert axis.

N tokens and K experts of each on this device, M = N K rows, E experts, D model width. P devices on
the expert axis, each with L = E / P experts and a buffer for C rows.

Rows are sorted by expert. Buffers hold the worst case, so nothing is dropped, unless a smaller one
is asked for (`fit`): a row it has no room for goes nowhere, as if its gate were 0. Moving rows is
linear, and the reverse of every movement here is another one of them; so gradients are moved as
rows are, and never scattered.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention import platform

# (rows [M, D] sorted by expert, sizes [L]) -> [M, D]
Compute = Callable[[jax.Array, jax.Array], jax.Array]


class Order(NamedTuple):
  """A permutation of M rows, and its inverse."""
  source: jax.Array                    # [M] int32: row i of the result was row source[i]
  target: jax.Array                    # [M] int32: row j went to target[j]


def sort(keys: jax.Array) -> Order:
  """The stable order of keys [M] int32."""
  source = jnp.argsort(keys, stable=True).astype(jnp.int32)
  target = jnp.zeros_like(source).at[source].set(
      jnp.arange(len(keys), dtype=jnp.int32), unique_indices=True)
  return Order(source, target)


@jax.custom_vjp
def take(x: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
  """x[index].

  Args:
    x: [N, D].
    index: [M] int32.
    back: [N, J] int32, the J places each row of x went to, where its gradient is read.
  """
  del back
  return jnp.take(x, index, axis=0)


def _take_forward(x, index, back):
  return jnp.take(x, index, axis=0), back


def _take_backward(back, grad):
  rows = jnp.take(grad, back.reshape(-1), axis=0).reshape(*back.shape, -1)
  return jnp.sum(rows, axis=1, dtype=jnp.float32).astype(grad.dtype), None, None


take.defvjp(_take_forward, _take_backward)


def local(
    x: jax.Array, experts: jax.Array, gates: jax.Array, sizes: jax.Array, compute: Compute,
) -> jax.Array:
  """Every token through its experts, as far as they are here.

  Args:
    x: [N, D].
    experts: [N, K] int32; L and above: not here, no expert at all.
    gates: [N, K] float32.
    sizes: [L] int32, tokens of every expert.
    compute: the experts.

  Returns:
    [N, D] in x's dtype: sum_k gates_k expert_k(x), formed in float32.
  """
  num_tokens, top_k = experts.shape
  order = sort(experts.reshape(-1))
  rows = take(x, order.source // top_k, order.target.reshape(num_tokens, top_k))
  rows = take(compute(rows, sizes), order.target, order.source[:, None])
  rows = rows.reshape(num_tokens, top_k, -1)
  return jnp.einsum('nkd,nk->nd', rows, gates, preferred_element_type=jnp.float32).astype(x.dtype)


def exchanged(compute: Compute, axis: str, counts: jax.Array, room: int) -> Compute:
  """`compute` for rows of all E experts, which lie over the devices of a mesh axis.

  To be called inside shard_map.

  Args:
    counts: [P, P, L] int32, rows from a device to an expert of another, of `gather` or `fit`; no
      device gets more than `room`.
    room: C, rows that a device's buffer holds.
  """
  held = counts.shape[2]

  def run(rows, sizes):
    del sizes                          # counts has them
    road, lanes = Road(axis, len(rows), room), jnp.sum(counts, axis=2)
    mine = jax.lax.dynamic_index_in_dim(
        counts, jax.lax.axis_index(axis), 1, keepdims=False)                     # [P, L]
    received = send(road, rows, lanes)                         # [C, D], by sender, then by expert
    sender_and_expert = jnp.searchsorted(
        jnp.cumsum(mine.reshape(-1)), jnp.arange(room), side='right')
    expert = jnp.where(sender_and_expert < mine.size, sender_and_expert % held, held)
    order = sort(expert.astype(jnp.int32))
    y = compute(take(received, order.source, order.target[:, None]), jnp.sum(mine, axis=0))
    return send(road.back, take(y, order.target, order.source[:, None]), lanes.T)

  return run


def gather(sizes: jax.Array, axis: str) -> jax.Array:
  """Every device's rows for every expert: [E] -> [P, P, L] (from, to, expert of that one)."""
  devices = jax.lax.axis_size(axis)
  return jax.lax.all_gather(sizes, axis).reshape(devices, devices, -1)


class Road(NamedTuple):
  """Between the devices of a mesh axis."""
  axis: str
  before: int                          # rows of a device's array,
  after: int                           # and of what it becomes

  @property
  def back(self) -> 'Road':
    return Road(self.axis, self.after, self.before)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send(road: Road, rows: jax.Array, lanes: jax.Array) -> jax.Array:
  """Rows to the devices that want them: [before, D] -> [after, D].

  They arrive by sender, and zeros are behind them. The reverse, which the derivative is, goes the
  road back with the lanes transposed.

  Args:
    rows: in the order of the devices they go to; rows that go nowhere are last.
    lanes: [P, P] int32, how many rows go from a device to another.
  """
  axis, devices, me = road.axis, len(lanes), jax.lax.axis_index(road.axis)
  leaving, arriving = lanes[me], lanes[:, me]
  begin = jnp.cumsum(leaving) - leaving
  if platform() != 'cpu':
    target = (jnp.cumsum(lanes, axis=0) - lanes)[me]
    buffer = jnp.zeros((road.after, rows.shape[1]), rows.dtype)
    return jax.lax.ragged_all_to_all(
        rows, buffer, begin, leaving, target, arriving, axis_name=axis)
  width = min(road.before, road.after)           # no two devices can have more for each other
  lane = jnp.take(rows, begin[:, None] + jnp.arange(width), axis=0, mode='clip')
  lane = jax.lax.all_to_all(lane, axis, 0, 0).reshape(devices * width, -1)
  end, place = jnp.cumsum(arriving), jnp.arange(road.after)
  device = jnp.searchsorted(end, place, side='right')
  safe = jnp.minimum(device, devices - 1)
  out = jnp.take(lane, safe * width + place - (end - arriving)[safe], axis=0, mode='clip')
  return jnp.where((device < devices)[:, None], out, 0)


send.defvjp(lambda road, rows, lanes: (send(road, rows, lanes), lanes),
            lambda road, lanes, grad: (send(road.back, grad, lanes.T), None))


# ---- Buffers that do not hold everything

def capacity(buffer: float, num_rows: int, devices: int) -> int:
  """C, rows of a device's buffer.

  Args:
    buffer: nn.config.MoE.buffer, times M, what a device gets under even loads, in whole tiles of
      eight rows; 0: all rows of all devices, should they want one device's experts.
    num_rows: M.
  """
  most = devices * num_rows
  return min(most, -(-math.ceil(buffer * num_rows) // 8) * 8) if buffer else most


def fit(counts: jax.Array, room: int) -> jax.Array:
  """As many of the rows as devices have room for: [P, P, L] (from, to, expert) -> the same.

  A device takes min(C, all) rows: of every expert up to a common number, which is as high as fits;
  one more of the first experts that have more, until it is full. Of an expert's rows the first
  ones are taken, by device and then by token.
  """
  quota = jax.vmap(lambda wanted: level(wanted, room))(jnp.sum(counts, axis=0))
  return jnp.clip(quota - (jnp.cumsum(counts, axis=0) - counts), 0, counts)


def level(wanted: jax.Array, room: int) -> jax.Array:
  """What `fit` gives to the experts of a device: [L] int32 -> [L]."""
  small = jnp.sort(wanted)
  # If all but the n smallest get the same, it is this much; never more than fits.
  number = jnp.max((room - jnp.cumsum(small) + small) // jnp.arange(len(small), 0, -1))
  given = jnp.minimum(wanted, number)
  more = wanted > number
  return given + (more & (jnp.cumsum(more) <= room - jnp.sum(given)))


def first(experts: jax.Array, sizes: jax.Array, kept: jax.Array) -> jax.Array:
  """The choice without the rows that are dropped: [N, K] int32, with E in their place.

  Args:
    experts: [N, K] int32; E: none.
    sizes: [E] int32, rows of every expert.
    kept: [E] int32, how many of them stay, the first ones by token.
  """
  flat, num_experts = experts.reshape(-1), len(sizes)
  safe = jnp.minimum(flat, num_experts - 1)
  rank = sort(flat).target - (jnp.cumsum(sizes) - sizes)[safe]
  return jnp.where(rank < kept[safe], flat, num_experts).reshape(experts.shape)
