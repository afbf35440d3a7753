"""Sampling: one prefill per prompt, then a decode loop that ends when every row has ended.

B prompts, N = B * group rows, P prompt slots, M response tokens, V vocabulary, S candidates,
W bytes of the longest token, R bytes a row remembers for its stop strings, K entries to choose
from. The model comes in as a Decoder; nothing here knows what is behind it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to sample. Temperature divides the logits; then top-k, then top-p, then min-p.

  top-p keeps the smallest set of likeliest ids whose share of what top-k left reaches it, the id
  that crosses it included. min-p keeps ids with at least min_p times the probability of the
  likeliest. With any of the three on, only the `support` likeliest ids are candidates to begin with
  (top_k, if that is smaller). This is part of the definition: top-p takes its shares of these.
  """
  max_tokens: int
  temperature: float = 1.0       # 0: the likeliest id, never mind the truncation
  top_k: int = 0                 # 0: off
  top_p: float = 1.0             # 1: off
  min_p: float = 0.0             # 0: off
  support: int = 0               # most ids recorded per token; wanted with truncation
  eos: tuple[int, ...] = ()      # ids that end a row
  stop: tuple[bytes, ...] = ()   # bytes that end a row, wherever tokens begin and end

  def __post_init__(self):
    if self.max_tokens < 1:
      raise ValueError(f'max_tokens is {self.max_tokens}, wanted at least 1')
    if not 0 <= self.temperature < math.inf:
      raise ValueError(f'temperature is {self.temperature}, wanted a finite number of at least 0')
    if self.top_k < 0:
      raise ValueError(f'top_k is {self.top_k}, wanted at least 1, or 0 for off')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p is {self.top_p}, wanted above 0 and at most 1')
    if not 0 <= self.min_p <= 1:
      raise ValueError(f'min_p is {self.min_p}, wanted between 0 and 1')
    if self.support < 0:
      raise ValueError(f'support is {self.support}, wanted at least 0')
    if self.truncates and self.temperature > 0 and not self.support:
      raise ValueError(
          f'top_k {self.top_k}, top_p {self.top_p}, min_p {self.min_p} cut ids off, so the ids '
          f'left are recorded: set support to the most per token, e.g. support={self.top_k or 64}')
    if any(token < 0 for token in self.eos):
      raise ValueError(f'eos holds a negative id: {self.eos}')
    if not all(isinstance(text, bytes) and text for text in self.stop):
      raise ValueError(f'stop wants a tuple of non-empty bytes, got {self.stop!r}')

  @property
  def truncates(self) -> bool:
    return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

  @property
  def candidates(self) -> int:
    """S: ids recorded per token; 0 where nothing is cut off."""
    if not self.truncates or self.temperature == 0:
      return 0
    return min(self.support, self.top_k or self.support)


class Decoder(NamedTuple):
  """A model, as far as sampling sees it. Make one per model: new functions compile anew.

  prefill: (params, tokens [B, P], start [B], length) -> (logits [B, V] float32, cache of `length`,
    extras [B, P, ...]).
  step: (params, tokens [N], cache) -> (logits [N, V] float32, cache, extras [N, ...]).
  repeat: (cache, n) -> cache with every row n times, copies of a row adjacent.

  Extras are whatever is to be kept of every token that was read: arrays in any pytree, or None.
  """
  prefill: Callable[..., Any]
  step: Callable[..., Any]
  repeat: Callable[..., Any]


class TokenBytes(NamedTuple):
  """What each id adds to the text."""
  data: np.ndarray               # [V, W] uint8, zeros behind the length
  length: np.ndarray             # [V] int32


class Sampled(NamedTuple):
  """Rows of a prompt are adjacent. Behind a row's length tokens and logp are 0, support is -1.

  logp is that of the distribution the token was drawn from; greedy: of temperature 1. A row's last
  token is not read, so its extras mean nothing, as those behind.
  """
  tokens: jax.Array              # [N, M] int32
  length: jax.Array              # [N] int32, the token that ended the row included
  logp: jax.Array                # [N, M] float32
  support: jax.Array | None      # [N, M, S] int32, ids to choose from, -1 fills up; None: all
  stopped: jax.Array             # [N] bool, by eos or a stop string; False: max_tokens came first
  prompt_extras: Any             # [B, P, ...], the decoder's, of the prompts
  extras: Any                    # [N, M, ...], and of the tokens


class _Knobs(NamedTuple):
  """Numbers that change without recompiling, [] float32."""
  temperature: np.ndarray
  top_p: np.ndarray
  min_p: np.ndarray


class _State(NamedTuple):
  """What the decode loop carries. Time comes first, so that a step writes one contiguous row."""
  index: jax.Array               # [] int32, response tokens drawn so far
  token: jax.Array               # [N] int32, drawn last
  tail: jax.Array                # [N, R] int16, each row's last bytes, -1 before its first
  tokens: jax.Array              # [M, N] int32
  logp: jax.Array                # [M, N] float32
  support: jax.Array             # [M, N, S] int32
  length: jax.Array              # [N] int32
  stopped: jax.Array             # [N] bool
  extras: Any                    # [M, N, ...]


def pack_bytes(words: Sequence[bytes], vocab_size: int) -> TokenBytes:
  """The table for the ids of a model; those behind the words (a padded vocabulary) add nothing."""
  if len(words) > vocab_size:
    raise ValueError(f'the tokenizer has {len(words)} ids, the model {vocab_size}')
  length = np.zeros(vocab_size, np.int32)
  length[:len(words)] = [len(word) for word in words]
  data = np.zeros((vocab_size, max(1, length.max())), np.uint8)
  for row, word in zip(data, words):
    row[:len(word)] = np.frombuffer(word, np.uint8)
  return TokenBytes(data, length)


def sample(
    decoder: Decoder,
    params: Any,
    tokens: jax.Array,
    start: jax.Array,
    keys: jax.Array,
    *,
    group: int,
    sampling: Sampling,
    token_bytes: TokenBytes | None = None,
) -> Sampled:
  """Draws `group` responses to every prompt.

  Token t of a row depends on its prompt, its key, its place in the group and t; not on the other
  rows, the padding, max_tokens or the mesh. It compiles anew for other shapes, max_tokens, group,
  candidates, eos and stop strings, not for another temperature, top_p or min_p.

  Args:
    tokens: [B, P] int32, prompts padded on the left.
    start: [B] int32, first slot that is not padding.
    keys: [B] typed threefry keys, one per prompt.
    token_bytes: wanted with stop strings.

  Raises:
    ValueError: shapes that do not fit, or keys and ids that cannot be served.
  """
  rows = tokens.shape[0]
  if tokens.ndim != 2 or start.shape != (rows,) or keys.shape != (rows,):
    raise ValueError('wanted tokens [B, P], start [B] and typed keys [B], got shapes '
                     f'{tokens.shape}, {start.shape} and {keys.shape}')
  if jax.random.key_impl(keys) != 'threefry2x32':
    raise ValueError(f'keys are of kind {jax.random.key_impl(keys)}, whose numbers for a row '
                     'depend on the other rows; wanted threefry2x32')
  if group < 1:
    raise ValueError(f'group is {group}, wanted at least 1')
  if sampling.stop and token_bytes is None:
    raise ValueError(f'stop strings {sampling.stop} need token_bytes, the bytes of every id')
  draw = _likeliest if sampling.temperature == 0 else _truncated if sampling.candidates else _any
  knobs = _Knobs(*map(np.float32, (sampling.temperature, sampling.top_p, sampling.min_p)))
  return _run(
      decoder, params, tokens, start, keys, knobs, token_bytes if sampling.stop else None,
      draw=draw, candidates=sampling.candidates, group=group, max_tokens=sampling.max_tokens,
      eos=tuple(sampling.eos), stop=tuple(sampling.stop))


@functools.partial(jax.jit, static_argnames=(
    'decoder', 'draw', 'candidates', 'group', 'max_tokens', 'eos', 'stop'))
def _run(decoder, params, tokens, start, keys, knobs, table, *, draw, candidates, group, max_tokens,
         eos, stop):
  num_rows, slots = tokens.shape[0] * group, tokens.shape[1] + max_tokens - 1
  members = jax.vmap(jax.random.fold_in, (None, 0))
  keys = jax.vmap(members, (0, None))(keys, jnp.arange(group)).reshape(num_rows)

  def record(state: _State, logits: jax.Array) -> _State:
    # The words of a token's key are random numbers already; drawing from it would hash once more.
    bits = jax.random.key_data(jax.vmap(lambda key: jax.random.fold_in(key, state.index))(keys))
    with jax.named_scope('draw'):
      token, logp, support = draw(logits.astype(jnp.float32), bits, knobs, candidates)
    going = ~state.stopped
    token = jnp.where(going, token, 0)
    put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, state.index, 0)
    ended, tail = _match(stop, state.tail, table, token)
    return state._replace(
        index=state.index + 1,
        token=token,
        tail=tail,
        tokens=put(state.tokens, token),
        logp=put(state.logp, jnp.where(going, logp, 0.0)),
        support=put(state.support, jnp.where(going[:, None], support, -1)),
        length=state.length + going,
        stopped=state.stopped | ended | jnp.isin(token, np.asarray(eos, np.int32)))

  def advance(carry):
    state, cache = carry
    logits, cache, extras = decoder.step(params, state.token, cache)
    put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, state.index - 1, 0)
    state = state._replace(extras=jax.tree.map(put, state.extras, extras))
    return record(state, logits), cache

  logits, cache, prompt_extras = decoder.prefill(params, tokens, start, slots)
  _check_ids(logits.shape[-1], candidates, eos, table)
  fresh = _State(
      index=jnp.zeros((), jnp.int32),
      token=jnp.zeros(num_rows, jnp.int32),
      tail=jnp.full((num_rows, max(map(len, stop), default=1) - 1), -1, jnp.int16),
      tokens=jnp.zeros((max_tokens, num_rows), jnp.int32),
      logp=jnp.zeros((max_tokens, num_rows), jnp.float32),
      support=jnp.full((max_tokens, num_rows, candidates), -1, jnp.int32),
      length=jnp.zeros(num_rows, jnp.int32),
      stopped=jnp.zeros(num_rows, bool),
      extras=jax.tree.map(
          lambda x: jnp.zeros((max_tokens, num_rows, *x.shape[2:]), x.dtype), prompt_extras))
  state, _ = jax.lax.while_loop(
      lambda carry: (carry[0].index < max_tokens) & ~jnp.all(carry[0].stopped), advance,
      (record(fresh, jnp.repeat(logits, group, axis=0)), decoder.repeat(cache, group)))
  rows_first = lambda x: jnp.swapaxes(x, 0, 1)
  return Sampled(state.tokens.T, state.length, state.logp.T,
                 rows_first(state.support) if candidates else None, state.stopped, prompt_extras,
                 jax.tree.map(rows_first, state.extras))


def _check_ids(vocab_size, candidates, eos, table):
  if candidates > vocab_size:
    raise ValueError(f'{candidates} candidates (support, top_k) of a vocabulary of {vocab_size}')
  if any(token >= vocab_size for token in eos):
    raise ValueError(f'eos {eos} is outside the vocabulary of {vocab_size}')
  if table is not None and table.length.shape != (vocab_size,):
    raise ValueError(f'token_bytes knows {table.length.shape[0]} ids, the model {vocab_size}')


def _match(stop, tail, table, token):
  """Whether this token completes a stop string, and the row's last bytes after it: [N], [N, R].

  Any match ends inside the new token, or the row would have stopped before.
  """
  if not stop:
    return jnp.zeros(token.shape, bool), tail
  piece, count = jnp.asarray(table.data)[token], jnp.asarray(table.length)[token]
  piece = jnp.where(jnp.arange(piece.shape[1]) < count[:, None], piece.astype(jnp.int16), -1)
  window = jnp.concatenate([tail, piece], axis=1)
  ended = jnp.zeros(token.shape, bool)
  for text in stop:
    ends = window.shape[1] - len(text) + 1
    equal = [window[:, i:i + ends] == byte for i, byte in enumerate(text)]
    ended |= jnp.any(functools.reduce(jnp.logical_and, equal), axis=1)
  last = count[:, None] + jnp.arange(tail.shape[1])
  return ended, jnp.take_along_axis(window, last, axis=1)


# The ways to draw: logits [N, V] float32, bits [N, 2] -> token [N], logp [N], support [N, S].


def _likeliest(logits, bits, knobs, candidates):
  """The first of the likeliest ids; the log-probability at temperature 1."""
  del bits, knobs, candidates
  token = _first(logits >= jnp.max(logits, axis=-1, keepdims=True))
  return token, _at(logits, token) - jax.nn.logsumexp(logits, axis=-1), _no_support(token)


def _any(logits, bits, knobs, candidates):
  """Any id, by inverting the cumulative distribution: over blocks of ids, then inside the block.

  Two random numbers a row, where the Gumbel trick wants V of them and two logarithms of each; the
  sum over blocks is the normaliser that logp needs anyway. Short sums, each with a fresh number,
  keep the tail: rounding moves about 2 * sqrt(V) * 2**-24 of the probability to other ids (3e-6 at
  V = 512, 5e-5 at V = 150k), and an id of probability 0 is never drawn. One sum over V would lose
  ids that weigh less than the last bit of the sum before them.
  """
  del candidates
  num_rows, vocab_size = logits.shape
  size = 2 ** math.ceil(math.log2(vocab_size) / 2)
  scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / knobs.temperature
  blocks = jnp.pad(scaled, ((0, 0), (0, -vocab_size % size)), constant_values=-jnp.inf)
  weight = jnp.exp(blocks.reshape(num_rows, -1, size))
  mass = jnp.sum(weight, axis=-1)
  block = _invert(mass, bits[:, 0])
  inside = jnp.take_along_axis(weight, block[:, None, None], axis=1)[:, 0]
  token = block * size + _invert(inside, bits[:, 1])
  return token, _at(scaled, token) - jnp.log(jnp.sum(mass, axis=-1)), _no_support(token)


def _truncated(logits, bits, knobs, candidates):
  """One of the ids that top-k, top-p and min-p leave; see Sampling."""
  top, ids = jax.lax.top_k(logits, candidates)
  scaled = (top - top[:, :1]) / knobs.temperature
  weight = jnp.exp(scaled)                                  # relative to the likeliest
  total = jnp.cumsum(weight, axis=-1)
  # Rounding may bring the mass before a late candidate to 1, where nothing must be cut.
  reaches = (total - weight < knobs.top_p * total[:, -1:]) | (knobs.top_p >= 1)
  keep = reaches & (weight >= knobs.min_p) & (weight > 0)
  weight = jnp.where(keep, weight, 0.0)
  choice = _invert(weight, bits[:, 0])
  logp = _at(scaled, choice) - jnp.log(jnp.sum(weight, axis=-1))
  return _at(ids, choice), logp, jnp.where(keep, ids, -1)


def _invert(weight: jax.Array, bits: jax.Array) -> jax.Array:
  """The entry in whose share of the total a random number falls.

  The number has 24 bits, so that it stays below 1, and its product with the total below the total.
  Sums added up in a tree move by a rounding where the weight is 0, hence the mask.

  Args:
    weight: [N, K] float32.
    bits: [N] uint32.

  Returns:
    [N] int32.
  """
  total = jnp.where(weight > 0, jnp.cumsum(weight, axis=-1), 0.0)
  number = (bits >> 8).astype(jnp.float32) * 2.0**-24
  return _first(total > (number * jnp.max(total, axis=-1))[:, None])


def _first(hit: jax.Array) -> jax.Array:
  """Index of the first True, the last index if there is none (NaN): [N, K] bool -> [N] int32.

  A minimum, because argmax is 7 to 15 times slower on CPU.
  """
  last = hit.shape[1] - 1
  return jnp.min(jnp.where(hit, jnp.arange(last + 1, dtype=jnp.int32), last), axis=1)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
  """[N, K], [N] -> [N]."""
  return jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]


def _no_support(token: jax.Array) -> jax.Array:
  return jnp.zeros((token.shape[0], 0), jnp.int32)
