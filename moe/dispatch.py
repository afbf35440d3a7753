"""Rows of tokens to the experts and back: on a device, and between those of the expert axis.

N tokens and K experts of each on this device, M = N K rows, E experts, D model width. P devices on
the expert axis, each with L = E / P experts.

Rows are sorted by expert and nothing is dropped: every buffer holds the worst case. Moving rows is
linear, and the reverse of every movement here is another one of them; so gradients are moved as
rows are, and never scattered.
"""

import functools
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


def exchanged(compute: Compute, axis: str, num_experts: int) -> Compute:
  """`compute` for rows of all E experts, which lie over the devices of a mesh axis.

  To be called inside shard_map. A device's buffer has room for all rows of all P devices, should
  they all want its experts.
  """
  devices = jax.lax.axis_size(axis)
  held = num_experts // devices

  def run(rows, sizes):
    counts = jax.lax.all_gather(sizes, axis).reshape(devices, devices, held)     # from, to, expert
    lanes = jnp.sum(counts, axis=2)
    mine = jax.lax.dynamic_index_in_dim(
        counts, jax.lax.axis_index(axis), 1, keepdims=False)                     # [P, L]
    received = send(axis, rows, lanes)             # [P M, D], a lane of M per sender
    bounds = jnp.cumsum(mine, axis=1)
    expert = jax.vmap(lambda b: jnp.searchsorted(b, jnp.arange(len(rows)), side='right'))(bounds)
    order = sort(expert.reshape(-1).astype(jnp.int32))
    y = compute(take(received, order.source, order.target[:, None]), jnp.sum(mine, axis=0))
    return send_back(axis, take(y, order.target, order.source[:, None]), lanes)

  return run


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send(axis: str, rows: jax.Array, lanes: jax.Array) -> jax.Array:
  """Rows to the devices that want them: [M, D] -> [P M, D].

  The result has a lane of M rows for every sender, with zeros behind what it sent.

  Args:
    rows: in the order of the devices they go to; rows that go nowhere are last.
    lanes: [P, P] int32, how many rows go from a device to another.
  """
  devices, me, num_rows = len(lanes), jax.lax.axis_index(axis), len(rows)
  begin = jnp.cumsum(lanes[me]) - lanes[me]
  if platform() != 'cpu':
    target = jnp.full(devices, me * num_rows, jnp.int32)
    buffer = jnp.zeros((devices * num_rows, rows.shape[1]), rows.dtype)
    return jax.lax.ragged_all_to_all(
        rows, buffer, begin, lanes[me], target, lanes[:, me], axis_name=axis)
  place = jnp.arange(num_rows)
  lane = jnp.take(rows, begin[:, None] + place, axis=0, mode='clip')
  lane = jnp.where((place < lanes[me][:, None])[..., None], lane, 0)
  return jax.lax.all_to_all(lane, axis, 0, 0).reshape(devices * num_rows, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send_back(axis: str, rows: jax.Array, lanes: jax.Array) -> jax.Array:
  """The reverse of `send`: [P M, D] -> [M, D], zeros for rows that went nowhere."""
  devices, me, num_rows = len(lanes), jax.lax.axis_index(axis), len(rows) // len(lanes)
  begin = jnp.cumsum(lanes, axis=1) - lanes      # where a device's rows for another one begin
  if platform() != 'cpu':
    source = jnp.arange(devices, dtype=jnp.int32) * num_rows
    buffer = jnp.zeros((num_rows, rows.shape[1]), rows.dtype)
    return jax.lax.ragged_all_to_all(
        rows, buffer, source, lanes[:, me], begin[:, me], lanes[me], axis_name=axis)
  lane = jax.lax.all_to_all(
      rows.reshape(devices, num_rows, -1), axis, 0, 0).reshape(devices * num_rows, -1)
  place = jnp.arange(num_rows)
  device = jnp.searchsorted(jnp.cumsum(lanes[me]), place, side='right')
  safe = jnp.minimum(device, devices - 1)
  out = jnp.take(lane, safe * num_rows + place - begin[me][safe], axis=0, mode='clip')
  return jnp.where((device < devices)[:, None], out, 0)


send.defvjp(lambda axis, rows, lanes: (send(axis, rows, lanes), lanes),
            lambda axis, lanes, grad: (send_back(axis, grad, lanes), None))
send_back.defvjp(lambda axis, rows, lanes: (send_back(axis, rows, lanes), lanes),
                 lambda axis, lanes, grad: (send(axis, grad, lanes), None))
