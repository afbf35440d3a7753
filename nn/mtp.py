"""Multi-token prediction (arXiv:2412.19437, eq. 21 to 25): heads that predict tokens further ahead.

Depth k joins what depth k - 1 knows of a position with the embedding of the next token and runs one
more layer; depth 0 is the model. Embedding and output head are the model's. B rows, T positions,
D model width, K depths.

As everywhere index t is about `tokens[:, t]`: at t depth k has read the tokens up to t, of which
the model itself has read those up to t - k, and `nn/score.py` asks it about t + 1. A segment's
first k positions have nothing that far back; there the layer sees padding, so documents that share
a row know nothing of each other.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from nn import block, norm, param
from nn.config import ModelConfig
from nn.linear import linear
from nn.types import Want

KINDS = ('mtp', 'draft')               # of wants that ask these heads


def specs(cfg: ModelConfig) -> dict:
  """{'0': depth 1, ...}: a layer, two norms of what is joined, the projection, the last norm."""
  width = norm.specs(cfg, cfg.embed_dim, 'embed')
  sizes = {'ffw': 2 * cfg.embed_dim, 'embed': cfg.embed_dim}
  one = block.specs(cfg, cfg.mtp_layer) | {
      'hidden_norm': width, 'embedding_norm': width,
      'project': param.matrix(sizes, ('ffw', 'embed'), contract=('ffw',)), 'norm': width}
  return {str(k): one for k in range(cfg.mtp.depth)}


def wanted(wants: tuple[Want, ...], cfg: ModelConfig) -> dict[tuple[str, ...], int]:
  """{what is cut off: how many depths} that the wants ask about.

  Raises:
    ValueError: more depths than the model has.
  """
  found = {}
  for want in wants:
    if want.kind in KINDS:
      found[want.detach] = max(found.get(want.detach, 0), want.size)
  if found and max(found.values()) > cfg.mtp.depth:
    raise ValueError(f'{max(found.values())} heads of multi-token prediction are asked for and the '
                     f'model has {cfg.mtp.depth}; set model.mtp.depth')
  return found


def apply(
    params: Mapping[str, dict], cfg: ModelConfig, hidden: jax.Array, embeddings: jax.Array,
    segments: jax.Array, layer: Callable, depth: int, detach: tuple[str, ...],
) -> tuple[jax.Array, list[dict]]:
  """Hidden states of depths 1 to `depth`.

  Each depth takes from the one before what is in front of that one's last norm or behind it, by
  cfg.mtp.hidden; that this holds for later depths, too, is our reading.

  Args:
    hidden: [B, T, D], of the model, as cfg.mtp.hidden wants it.
    embeddings: [B, T, D], of tokens[:, t].
    layer: (params, x, segments) -> (x, what the layer reports).
    detach: trunk, embedding: no gradient goes there. What it says of the head is for `nn/score.py`.

  Returns:
    [depth, B, T, D] in the compute dtype, behind the norms in front of the head, and the reports.
  """
  if 'trunk' in detach:
    hidden = jax.lax.stop_gradient(hidden)
  if 'embedding' in detach:
    embeddings = jax.lax.stop_gradient(embeddings)
  out, extras = [], []
  for k, known in enumerate(reach(segments, depth)):
    p = params[str(k)]
    joined = {'hidden': norm.apply(p['hidden_norm'], cfg, previous(hidden)),
              'embedding': norm.apply(p['embedding_norm'], cfg, embeddings)}
    x = linear(jnp.concatenate([joined[part] for part in cfg.mtp.order], axis=-1), p['project'])
    x = param.constrain(x, cfg.rules, 'batch', 'time', None)
    x, more = layer(p, x, jnp.where(known, segments, 0))
    normed = norm.apply(p['norm'], cfg, x)
    hidden = normed if cfg.mtp.hidden == 'after' else x
    out.append(normed)
    extras.append(more)
  return jnp.stack(out), extras


def reach(segments: jax.Array, depth: int) -> list[jax.Array]:
  """Where the token 1, 2, ..., depth positions back is of the same segment: [B, T] bool each."""
  inside = ((segments == previous(segments)) & (segments != 0)
            & (jnp.arange(segments.shape[1]) > 0))
  known = [inside]
  while len(known) < depth:
    known.append(inside & previous(known[-1]))
  return known


def previous(x: jax.Array) -> jax.Array:
  """What is one position back; the first position has itself: [B, T, ...] -> the same shape."""
  return jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)


def flops(cfg: ModelConfig, length: int) -> int:
  """Floating point operations of a depth's forward pass, per token, without the output head."""
  return block.flops(cfg, cfg.mtp_layer, length) + 2 * 2 * cfg.embed_dim ** 2
