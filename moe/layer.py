"""The mixture-of-experts feed-forward layer: of SwiGLU experts a router chooses K for every token.

B rows, T positions, D model width, E experts, K experts of a token, F inner width of an expert, S
of the shared one.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels import grouped_matmul as kernel
from moe import dispatch, router
from nn import param
from nn.config import ModelConfig
from nn.linear import Adapted, linear
from nn.param import Spec


def inner_dim(cfg: ModelConfig) -> int:
  """F."""
  return cfg.moe.ffw_dim or cfg.ffw_dim // cfg.moe.top_k


def specs(cfg: ModelConfig) -> dict[str, Spec]:
  """The router and its bias are no matrices of the table, and stay float32 in decoding.

  So both sides choose alike.
  """
  sizes = {'expert': cfg.moe.experts, 'embed': cfg.embed_dim, 'ffw': inner_dim(cfg)}
  small = (2 * len(cfg.layers)) ** -0.5
  router_init = param.normal(cfg.embed_dim ** -0.5)
  table = {
      'router': Spec((cfg.embed_dim, cfg.moe.experts), ('embed', 'expert'), router_init),
      'gate': param.matrix(sizes, ('expert', 'embed', 'ffw'), contract=('embed',)),
      'up': param.matrix(sizes, ('expert', 'embed', 'ffw'), contract=('embed',)),
      'down': param.matrix(sizes, ('expert', 'ffw', 'embed'), contract=('ffw',), scale=small),
  }
  if cfg.moe.has_bias:
    table['bias'] = Spec((cfg.moe.experts,), ('expert',), param.zeros, trainable=False)
  if cfg.moe.shared_dim:
    sizes['ffw'] = cfg.moe.shared_dim
    table['shared'] = {
        'gate': param.matrix(sizes, ('embed', 'ffw'), contract=('embed',)),
        'up': param.matrix(sizes, ('embed', 'ffw'), contract=('embed',)),
        'down': param.matrix(sizes, ('ffw', 'embed'), contract=('ffw',), scale=small),
    }
  if cfg.moe.shared_gate:
    table['shared_gate'] = Spec((cfg.embed_dim,), ('embed',), router_init)
  return table


def apply(
    params: dict, cfg: ModelConfig, x: jax.Array, segments: jax.Array,
    routes: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
  """scale * sum_k gate_k expert_k(x), and the shared expert.

  Args:
    x: [B, T, D] in the compute dtype.
    segments: [B, T] int32; 0 is padding: it goes to no expert and counts in no load or loss.
    routes: [B, T, K] integers, experts to take instead of choosing; -1 where none is replayed.

  Returns:
    [B, T, D], and what there is to report: routes [B, T, K] int32 (-1 at padding), own_routes
    likewise (what the router chose), load [E] int32, and the auxiliary losses, already times their
    coefficients: means over all tokens of the batch, on all devices. With cfg.moe.buffer also
    dropped [] int32, how many of the choices in load had no room; load and routes have them all.
  """
  if routes is None:
    routes = jnp.full((*segments.shape, cfg.moe.top_k), -1, jnp.int32)
  experts = {
      name: params[name] for name in ('router', 'bias', 'gate', 'up', 'down') if name in params}
  experts = {name: w.merged() if isinstance(w, Adapted) else w for name, w in experts.items()}
  y, routes, stats = split_over_devices(cfg, experts, x, segments, routes)
  counted = {name: stats[name] for name in ('load', 'dropped') if name in stats}
  extras = {'aux_loss': router.losses(stats, cfg.moe), **counted, **routes}
  if 'shared' in params:
    y = y + shared(params, cfg, x)
  return y, extras


def shared(params: dict, cfg: ModelConfig, x: jax.Array) -> jax.Array:
  """What every token goes through: [B, T, D] -> [B, T, D]."""
  p = params['shared']
  inner = jax.nn.silu(linear(x, p['gate'])) * linear(x, p['up'])
  y = linear(param.constrain(inner, cfg.rules, 'batch', 'time', 'ffw'), p['down'])
  if 'shared_gate' in params:
    y = y * jax.nn.sigmoid(logits(x, params['shared_gate'][:, None])).astype(y.dtype)
  return y


def logits(x: jax.Array, w: jax.Array) -> jax.Array:
  """[..., D], [D, O] -> [..., O] in full float32, which is not the default on every platform."""
  with jax.default_matmul_precision('highest'):
    return linear(x.astype(jnp.float32), w)


def split_over_devices(
    cfg: ModelConfig, params: dict, x: jax.Array, segments: jax.Array, routes: jax.Array,
) -> tuple[jax.Array, dict, dict]:
  """`routed` on every device's tokens and experts; its result, and statistics of all tokens."""
  mesh = jax.sharding.get_abstract_mesh()
  check_buffer(cfg, mesh.shape)
  if mesh.size <= 1 or cfg.moe.dispatch == 'global':
    if mesh.size > 1 and cfg.moe.matmul == 'auto':     # the compiler can split loops, and no kernel
      cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, matmul='blocks'))
    y, routes, stats = routed(params, x, segments, routes, cfg=cfg, rows=(), expert=(), ffw=())
    return y, routes, jax.tree.map(lambda a: a[0], stats)
  axes = functools.partial(param.mesh_axes, cfg.rules)
  batch, time = axes('batch', x.shape[0]), axes('time', x.shape[1])
  expert, ffw = axes('expert', cfg.moe.experts), axes('ffw', inner_dim(cfg))
  wanted = math.prod(mesh.shape.get(name, 1) for name in dict(cfg.rules)['expert'])
  if len(expert) > 1 or (wanted > 1 and not expert):
    raise ValueError(
        f'model.moe.experts {cfg.moe.experts} must be a multiple of the {wanted} devices they are '
        f'split over, and these one axis of the mesh; the rule says {dict(cfg.rules)["expert"]}')
  tokens = PartitionSpec(batch or None, time or None)
  wide = PartitionSpec(expert or None, None, ffw or None)
  places = {'router': PartitionSpec(), 'bias': PartitionSpec(), 'gate': wide, 'up': wide,
            'down': PartitionSpec(expert or None, ffw or None, None)}
  body = functools.partial(routed, cfg=cfg, rows=batch + time, expert=expert, ffw=ffw)
  y, routes, stats = jax.shard_map(
      body, check_vma=False,
      in_specs=({name: places[name] for name in params}, tokens, tokens, tokens),
      out_specs=(tokens, tokens, PartitionSpec(batch + time or None)))(params, x, segments, routes)
  return y, routes, jax.tree.map(lambda a: jnp.sum(a, axis=0), stats)


def check_buffer(cfg: ModelConfig, mesh: Mapping[str, int]) -> None:
  """Refuses a buffer that nothing would go through.

  Args:
    mesh: {axis: devices along it}.
  """
  rules = dict(cfg.rules)
  split = {name for name in rules['expert'] if mesh.get(name, 1) > 1}
  if cfg.moe.buffer and not (split and split <= {*rules['batch'], *rules['time']}):
    raise ValueError(
        f'model.moe.buffer is {cfg.moe.buffer}, but no rows travel to experts on other devices: '
        f'the mesh is {dict(mesh)}; set mesh.expert above 1, or model.moe.buffer to 0')


def routed(
    params: dict, x: jax.Array, segments: jax.Array, routes: jax.Array, *, cfg: ModelConfig,
    rows: tuple[str, ...], expert: tuple[str, ...], ffw: tuple[str, ...],
) -> tuple[jax.Array, dict, dict]:
  """The routed experts for the tokens of one device.

  Args:
    params: the router whole; of the experts those of this device.
    rows, expert, ffw: mesh axes that tokens, experts and the inner width are split over.

  Returns:
    [B, T, D], {routes, own_routes: [B, T, K]}, and `router.statistics` with a leading axis of 1;
    with cfg.moe.buffer among them dropped, this device's.
  """
  num_rows, length, width = x.shape
  flat, real = x.reshape(-1, width), segments.reshape(-1) != 0
  choice = router.route(
      logits(flat, params['router']), params.get('bias'), cfg.moe, routes.reshape(len(flat), -1))
  stats = router.statistics(choice, real)
  chosen, sizes = jnp.where(real[:, None], choice.experts, cfg.moe.experts), stats['load']
  compute = functools.partial(feed_forward, params, cfg.moe.matmul)
  apart = set(expert) <= set(rows)       # devices along the expert axis have tokens of their own
  if cfg.moe.buffer:
    stats['dropped'] = jnp.int32(0)
  if expert and apart:
    counts = dispatch.gather(sizes, expert[0])
    room = dispatch.capacity(cfg.moe.buffer, chosen.size, len(counts))
    if room < chosen.size * len(counts):
      counts = dispatch.fit(counts, room)
      kept = counts[jax.lax.axis_index(expert[0])].reshape(-1)
      stats['dropped'] = jnp.sum(sizes - kept)
      chosen, sizes = dispatch.first(chosen, sizes, kept), kept
    compute = dispatch.exchanged(compute, expert[0], counts, room)
  elif expert:                           # all have the same tokens: each does its experts' share
    held = cfg.moe.experts // jax.lax.axis_size(expert[0])
    first = jax.lax.axis_index(expert[0]) * held
    here = (chosen >= first) & (chosen < first + held)
    chosen, sizes = (
        jnp.where(here, chosen - first, held), jax.lax.dynamic_slice_in_dim(sizes, first, held))
  y = dispatch.local(flat, chosen, choice.gates, sizes, compute)
  if partial := ffw + (() if apart else expert):
    y = jax.lax.psum(y, partial)
  report = lambda experts: jnp.where(real[:, None], experts, -1).reshape(num_rows, length, -1)
  routes = {'routes': report(choice.experts), 'own_routes': report(choice.own)}
  return y.reshape(x.shape), routes, jax.tree.map(lambda a: a[None], stats)


def feed_forward(params: dict, matmul: str, rows: jax.Array, sizes: jax.Array) -> jax.Array:
  """down(silu(gate(x)) * up(x)) of every row's expert: [M, D] sorted by expert, [L] -> [M, D]."""
  product = functools.partial(kernel.grouped_matmul, sizes=sizes, implementation=matmul)
  inner = jax.nn.silu(product(rows, params['gate'])) * product(rows, params['up'])
  return product(inner, params['down'])


def after_update(params: dict, cfg: ModelConfig, load: jax.Array) -> dict:
  """The layer's parameters after an optimiser step: the selection bias moved towards even loads.

  Args:
    load: [..., E], of the whole step; params may be stacked alike.
  """
  if 'bias' not in params:
    return params
  return params | {'bias': router.update_bias(params['bias'], load, cfg.moe.bias_rate)}


def flops(cfg: ModelConfig, length: int) -> int:
  """Floating point operations of the forward pass, per token: those of the K experts it goes to."""
  del length
  wide = cfg.moe.top_k * inner_dim(cfg) + cfg.moe.shared_dim
  return 2 * cfg.embed_dim * (3 * wide + cfg.moe.experts + cfg.moe.shared_gate)
