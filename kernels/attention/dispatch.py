"""Which implementation runs. B rows, T positions, H query heads, G key/value heads, K head size."""

import jax

from kernels.attention import chunked, reference

IMPLEMENTATIONS = {'reference': reference.attention, 'chunked': chunked.attention}


def choose(platform: str, length: int, head_dim: int) -> str:
  """The implementation that 'auto' stands for on a platform (cpu, tpu, gpu), at T positions and head size K."""
  del platform, length, head_dim
  return 'chunked'


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segments: jax.Array, scale: float | None = None,
    implementation: str = 'auto',
) -> jax.Array:
  """Causal attention within equal non-zero segments, see `reference`.

  Args:
    q: [B, T, H, K].
    k, v: [B, T, G, K]; H is a multiple of G.
    segments: [B, T] int32; 0 is padding, which gives zeros.
    scale: of the scores; K**-0.5 unless given.
    implementation: a name of IMPLEMENTATIONS, or 'auto', see `choose`.

  Returns:
    [B, T, H, K] in q's dtype.
  """
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  if implementation == 'auto':
    implementation = choose(jax.default_backend(), q.shape[1], q.shape[3])
  return IMPLEMENTATIONS[implementation](q, k, v, segments=segments, scale=scale)
