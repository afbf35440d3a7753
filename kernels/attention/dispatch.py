"""Which implementation runs, and on which shard of the arrays.

B rows, T positions, H query heads, G key/value heads, K head size, V size of a value (often K).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels.attention import chunked, gpu, reference, splash

IMPLEMENTATIONS = {
    'reference': reference.attention,
    'chunked': chunked.attention,
    'splash': splash.attention,
    'gpu': gpu.attention,
}
KERNEL_PLATFORM = {'splash': 'tpu', 'gpu': 'gpu'}              # the others run everywhere
# What 'auto' stands for: the kernels for rows of at least one block, with head sizes proved to
# compile.
AUTO = {'cpu': 'chunked', 'tpu': 'splash', 'gpu': 'gpu'}
SHORTEST, WIDEST = 128, 256            # positions, head size
WINDOWED = ('reference', 'chunked', 'splash')      # the GPU's kernel sees whole segments only


class Axes(NamedTuple):
  """Mesh axes that axes of the arrays are split over."""
  batch: tuple[str, ...] = ()
  heads: tuple[str, ...] = ()
  kv_heads: tuple[str, ...] = ()


def platform() -> str:
  """cpu, tpu or gpu: of the ambient mesh (perhaps only to compile for), or else of this process."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def choose(on: str, length: int, head_dim: int, window: int = 0) -> str:
  """The implementation that 'auto' stands for on platform `on`, at T positions.

  head_dim: the larger of K and V.
  """
  if on not in AUTO:
    raise ValueError(f'no attention for platform {on!r}; known are {sorted(AUTO)}')
  plain = length < SHORTEST or head_dim > WIDEST or (window and AUTO[on] not in WINDOWED)
  return 'chunked' if plain else AUTO[on]


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segments: jax.Array, scale: float | None = None,
    window: int = 0, implementation: str = 'auto', axes: Axes = Axes(),
) -> jax.Array:
  """Causal attention within equal non-zero segments; the definition is in `reference`.

  Args:
    q: [B, T, H, K].
    k: [B, T, G, K], v: [B, T, G, V]; H is a multiple of G.
    segments: [B, T] int32; 0 is padding, which gives zeros.
    scale: of the scores; K**-0.5 unless given.
    window: positions that a position sees, itself included; 0: all before it.
    implementation: a name of IMPLEMENTATIONS, or 'auto', see `choose`.
    axes: how the arrays are split over the ambient mesh. A kernel runs on each device's own rows
      and heads.

  Returns:
    [B, T, H, V] in q's dtype.

  Raises:
    ValueError: shapes that do not fit; an implementation that does not exist, or not on this
      platform.
  """
  rows, heads, groups = q.shape[:2], q.shape[2], k.shape[2]
  if (k.shape != (*rows, groups, q.shape[3]) or v.shape[:3] != k.shape[:3] or heads % groups
      or segments.shape != rows):
    raise ValueError(
        f'q {q.shape}, k {k.shape}, v {v.shape}, segments {segments.shape} do not fit together')
  if implementation == 'auto':
    implementation = choose(platform(), q.shape[1], max(q.shape[3], v.shape[3]), window)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
        f'unknown attention {implementation!r}; known are auto, {", ".join(IMPLEMENTATIONS)}')
  home = KERNEL_PLATFORM.get(implementation, platform())
  if platform() != home:
    raise ValueError(f'attention {implementation!r} runs on {home}, not on {platform()}')
  if window and implementation not in WINDOWED:
    raise ValueError(f'attention {implementation!r} has no window; take one of {WINDOWED}, or auto')
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  run = functools.partial(IMPLEMENTATIONS[implementation], scale=scale)
  if window:
    run = functools.partial(run, window=window)
  if implementation in KERNEL_PLATFORM:
    return per_device(run, q, k, v, segments, axes)
  return run(q, k, v, segments=segments)


def per_device(
    run, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, axes: Axes,
) -> jax.Array:
  """run(q, k, v, segments=...) on every device's rows and heads.

  The compiler cannot split a kernel by itself.
  """
  if jax.sharding.get_abstract_mesh().size <= 1:
    return run(q, k, v, segments=segments)
  if axes.kv_heads != axes.heads:      # a device's query heads may need any key head
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
  rows = axes.batch or None
  heads = PartitionSpec(rows, None, axes.heads or None)
  return jax.shard_map(
      lambda q, k, v, segments: run(q, k, v, segments=segments), check_vma=False,
      in_specs=(heads, heads, heads, PartitionSpec(rows)), out_specs=heads)(q, k, v, segments)
