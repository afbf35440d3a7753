"""What crosses folders: what can be read off a forward pass, the batch, and what a model returns.

B rows, T positions, D model width, S ids of a truncated support, K depth of multi-token prediction.
Index t is always about `tokens[:, t]`: `logp[:, t]` is the log-probability of `tokens[:, t]`. Only
`nn/score.py` shifts.
"""

import dataclasses
from typing import Any

import flax.struct
import jax


@dataclasses.dataclass(frozen=True, order=True)
class Want:
  """One thing to read off a forward pass. Ordered, so that tracing never depends on hash order."""
  kind: str          # logp, entropy, pull, mtp, draft, topk, at, fixed
  size: int = 0      # topk: k.  fixed: the token id.  mtp, draft: the depth
  ids: str = ''      # at: key of the batch data whose first array holds the ids, [B, T, k]
  detach: tuple[str, ...] = ()         # mtp, draft: of DETACH


LOGP, ENTROPY = Want('logp'), Want('entropy')
# Squared norm of the gradient of LOGP with respect to the unembedding's matrix: [B, T].
PULL = Want('pull')


def topk(k: int) -> Want:
  """The k likeliest ids and their log-probabilities: ([B, T, k] int32, [B, T, k] float32)."""
  return Want('topk', size=k)


def at(key: str) -> Want:
  """Log-probabilities of ids `batch.data[key][0]` and of the rest together: ([B, T, k], [B, T])."""
  return Want('at', ids=key)


def fixed(token: int) -> Want:
  """Log-probability of one id, and the log-normaliser of all other logits: ([B, T], [B, T])."""
  return Want('fixed', size=token)


# What heads of multi-token prediction share with the model, and send gradients to unless cut off.
DETACH = ('embedding', 'head', 'trunk')


def mtp(depth: int, detach: tuple[str, ...] = ()) -> Want:
  """LOGP as this head of multi-token prediction has it, without the hidden states of the last
  `depth` tokens before; 0 where its segment has not depth + 1 tokens before: [B, T].

  Args:
    detach: parts of DETACH to which this sends no gradient.
  """
  if unknown := set(detach) - set(DETACH):
    raise ValueError(f'detach names {sorted(unknown)}, wanted some of {", ".join(DETACH)}')
  return Want('mtp', size=depth, detach=tuple(sorted(set(detach))))


def draft(depth: int, detach: tuple[str, ...] = ()) -> Want:
  """What this head would draft, its likeliest id: three arrays [B, T] float32 of 0 and 1.

  They are whether it has anything to predict from, and whether then that id is the token, and is
  the likeliest of LOGP.
  """
  return dataclasses.replace(mtp(depth, detach), kind='draft')


@flax.struct.dataclass
class Batch:
  """The rows of one optimiser step.

  A batch carries weights, not a mode: the loss is sum coef * sum(weight * value).
  """
  tokens: jax.Array                  # [B, T] int32
  positions: jax.Array               # [B, T] int32, from 0 in every segment
  segments: jax.Array                # [B, T] int32; 0 is padding and nothing else
  masks: dict[str, jax.Array]        # {name: [B, T] float32 of 0 and 1}
  weights: dict[str, jax.Array]      # {term: [B, T] or [B] float32}
  coef: dict[str, jax.Array]         # {term: [] float32}
  # {label: arrays [B, T, ...]}: old, reference and teacher log-probabilities, ...
  data: dict[str, Any]
  temperature: jax.Array             # [] float32, divides the logits before every softmax
  use: jax.Array                     # [] int32, which use of these rows this is
  advantage: jax.Array | None = None  # [B, T] float32
  # [B, T, S] int32, ids the sampler could choose from; -1 fills up, all -1: every id
  support: jax.Array | None = None
  # {layer index: [B, T, top_k] integers}, experts the sampler took for tokens[:, t] when it read
  # it; -1: it did not read it
  routes: dict[int, jax.Array] | None = None


@flax.struct.dataclass
class Output:
  """What `nn.model.forward` returns."""
  hidden: jax.Array                  # [B, T, D] in the compute dtype, after the final norm
  # {Want.detach: [K, B, T, D]}, likewise, of the heads that were asked for, see nn/mtp.py
  mtp_hidden: dict[tuple[str, ...], jax.Array] = dataclasses.field(default_factory=dict)
  aux_loss: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # {name: []}
  # {layer index: [B, T, top_k] int32}, experts taken; -1 at padding
  routes: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
  # what the routers chose themselves: the same, except where routes were given
  own_routes: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
  # {layer index: [experts] int32}, sums
  load: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
  # {layer index: [] int32}, of these choices those that found no room, under model.moe.buffer
  dropped: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
  metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)   # {name: []}


@flax.struct.dataclass
class Cache:
  """The state of decoding. Rows are padded on the left, so that one slot index serves all rows.

  layers: per-mixer states, nested like the parameters ({'head': .., 'blocks': .., 'tail': ..};
    blocks stacked over repeats, or a tuple of repeats where the model unrolls them).
  """
  layers: dict[str, Any]
  start: jax.Array                   # [B] int32, first slot that is not padding
  index: jax.Array                   # [] int32, next slot to be written
  length: int = flax.struct.field(pytree_node=False)     # number of slots
