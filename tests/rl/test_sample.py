"""Sampling: what is drawn, what is recorded, when rows end, and what must not matter.

Most tests use toy decoders: Markov (the next token depends on the last one, so that probabilities
are known), Script (the next token is given) and Memory (it depends on everything before it).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nn import model, score
from nn.config import ModelConfig
from nn.types import LOGP, Batch
from rl import sample
from rl.sample import Decoder, Sampling


def repeat(cache, n):
  return jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), cache)


MARKOV = Decoder(                      # params: logits [V, V] after each token
    prefill=lambda params, tokens, start, length: (params[tokens[:, -1]], (), None),
    step=lambda params, tokens, cache: (params[tokens], cache, None),
    repeat=repeat)


def read_script(params, place):
  wanted = jnp.take_along_axis(params, place[:, None], axis=1)
  return jnp.where(jnp.arange(VOCAB) == wanted, 0.0, -jnp.inf), place, None


VOCAB = 8
SCRIPT = Decoder(                      # params: tokens to be said [N, M]
    prefill=lambda params, tokens, start, length: read_script(
        params, jnp.zeros(len(tokens), jnp.int32)),
    step=lambda params, tokens, cache: read_script(params, cache + 1),
    repeat=repeat)


def remember(params, state, token):
  return jnp.tanh(0.9 * state + params['in'][token])


def memory_prefill(params, tokens, start, length):
  def one(state, xs):
    token, slot = xs
    return jnp.where((slot >= start)[:, None], remember(params, state, token), state), None
  state = jnp.zeros((len(tokens), params['in'].shape[1]))
  state, _ = jax.lax.scan(one, state, (tokens.T, jnp.arange(tokens.shape[1])))
  return state @ params['out'], state, None


def memory_step(params, tokens, cache):
  cache = remember(params, cache, tokens)
  return cache @ params['out'], cache, None


MEMORY = Decoder(memory_prefill, memory_step, repeat)
MEMORY_PARAMS = {
    'in': jax.random.normal(jax.random.key(1), (19, 6)),
    'out': 0.7 * jax.random.normal(jax.random.key(2), (6, 19))}


def pad_left(prompts, slots):
  tokens = np.zeros((len(prompts), slots), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[slots - len(prompt):] = prompt
  return jnp.asarray(tokens), jnp.array([slots - len(p) for p in prompts], jnp.int32)


def draw(decoder, params, prompts, *, group=1, slots=0, seed=0, keys=None, table=None, **options):
  tokens, start = pad_left(prompts, slots or max(map(len, prompts)))
  keys = jax.random.split(jax.random.key(seed), len(prompts)) if keys is None else keys
  out = sample.sample(
      decoder, params, tokens, start, keys, group=group, sampling=Sampling(**options),
      token_bytes=table)
  return jax.tree.map(np.asarray, out)


# What is drawn


def check_counts(tokens, probability):
  """Chi-square at a level of one in a thousand; the seed is fixed: it passes always or never."""
  counts, expected = np.bincount(tokens, minlength=len(probability)), len(tokens) * probability
  assert counts[probability == 0].sum() == 0
  rare = expected < 5                  # too few for the test's approximation, so counted as one
  pool = lambda x: np.append(x[~rare], x[rare].sum()) if expected[rare].sum() >= 5 else x[~rare]
  counts, expected = pool(counts), pool(expected)
  if len(counts) > 1:
    assert scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize('vocab_size', [5, 37])
@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_draws_follow_the_softmax(vocab_size, temperature):
  rng = np.random.default_rng(vocab_size)
  logits = 1.5 * rng.standard_normal((vocab_size, vocab_size)).astype(np.float32)
  logits[1, 0] = -np.inf
  expected = softmax(np.float64(logits) / temperature)

  out = draw(MARKOV, jnp.asarray(logits), [[0, 1]], group=20_000, max_tokens=2,
             temperature=temperature)

  first, second = out.tokens.T
  check_counts(first, expected[1])
  usual = expected[1].argmax()
  check_counts(second[first == usual], expected[usual])
  np.testing.assert_allclose(out.logp[:, 0], np.log(expected[1][first]), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(out.logp[:, 1], np.log(expected[first, second]), rtol=1e-5, atol=1e-6)
  assert out.support is None


def test_truncated_draws_follow_the_renormalised_softmax():
  probability = np.array([0.1, 0.3, 0.05, 0.35, 0.2])
  kept = np.array([0, 0.3, 0, 0.35, 0.2]) / 0.85

  out = draw(MARKOV, jnp.log(jnp.tile(probability, (5, 1))), [[0]], group=20_000, max_tokens=2,
             top_k=3, support=4)

  for t in range(2):
    check_counts(out.tokens[:, t], kept)
  np.testing.assert_allclose(out.logp, np.log(kept[out.tokens]), rtol=1e-5)


def test_two_tokens_of_a_row_are_independent():
  out = draw(MARKOV, jnp.zeros((4, 4)), [[0]], group=20_000, max_tokens=2)
  pair = out.tokens[:, 0] * 4 + out.tokens[:, 1]
  check_counts(pair, np.full(16, 1 / 16))


def test_shares_of_the_random_number_are_those_of_the_weights():
  """Evenly spaced numbers fall into each share as often as its size says."""
  weight = np.array([0, 1, 3, 0, 4, 0], np.float32) / 8
  bits = np.arange(1024, dtype=np.uint32) << 22
  index = sample._invert(jnp.tile(weight, (1024, 1)), jnp.asarray(bits))
  np.testing.assert_array_equal(np.bincount(index, minlength=6), 1024 * weight)


def test_an_id_of_weight_0_is_never_drawn(monkeypatch):
  """Accelerators add in a tree, so that a running sum moves by a rounding where the weight is 0."""
  tree = lambda weight, axis: jax.lax.associative_scan(jnp.add, weight, axis=axis)
  monkeypatch.setattr(sample.jnp, 'cumsum', tree)
  rng = np.random.default_rng(0)
  weight = (rng.exponential(size=(4000, 64)) * (rng.random((4000, 64)) < 0.3)).astype(np.float32)
  total = np.asarray(jax.jit(tree, static_argnames='axis')(weight, axis=1))
  invert = jax.jit(lambda weight, bits: sample._invert(weight, bits))
  assert (np.diff(total)[weight[:, 1:] == 0] != 0).any()
  for bits in (0, 2**31, 2**32 - 1):
    index = np.asarray(invert(weight, np.full(4000, bits, np.uint32)))
    assert (weight[np.arange(4000), index] > 0).all()


def test_many_ids_that_are_each_below_the_last_bit_of_the_sum_keep_their_share():
  """2^16 ids of 2^-24 hold 2^-8 of the probability together; 1 + 2^-24 is 1 in float32."""
  logits = jnp.full((16, 2**16), -24 * math.log(2)).at[:, 0].set(0.0)
  number = 1 - 2.0**-9 * (np.arange(16) + 0.5) / 16          # all in the upper half of that share
  bits = np.stack([np.uint32(number * 2**32), np.full(16, 2**31, np.uint32)], axis=1)
  knobs = sample._Knobs(np.float32(1), np.float32(1), np.float32(0))
  token, _, _ = sample._any(logits, bits, knobs, 0)
  np.testing.assert_allclose(token, 2**16 * (1 - (np.arange(16) + 0.5) / 32), atol=600)


def test_greedy_takes_the_first_likeliest_id_and_records_its_probability_at_temperature_1():
  logits = jnp.array([[0.0, 3.0, 1.0, 3.0], [1.0, 0.0, -1.0, 0.5], [0.0] * 4, [0.0] * 4])

  out = draw(MARKOV, logits, [[0], [1]], max_tokens=2, temperature=0.0, top_k=2)

  np.testing.assert_array_equal(out.tokens, [[1, 0], [0, 1]])
  after = np.log(softmax(np.asarray(logits, np.float64)))
  expected = [[after[0, 1], after[1, 0]], [after[1, 0], after[0, 1]]]
  np.testing.assert_allclose(out.logp, expected, rtol=1e-6)
  assert out.support is None


# Truncation by hand: ids 2, 0, 3, 1 have probabilities 0.4, 0.3, 0.2, 0.1.

HAND = jnp.log(jnp.tile(jnp.array([0.3, 0.1, 0.4, 0.2]), (4, 1)))


@pytest.mark.parametrize('options, kept', [
    (dict(top_k=2), [2, 0]),
    (dict(top_k=1), [2]),
    (dict(top_p=0.65), [2, 0]),                    # 0.4, 0.7: the id that crosses is included
    (dict(top_p=0.75), [2, 0, 3]),
    (dict(top_p=0.01), [2]),
    (dict(top_k=3, top_p=0.75), [2, 0]),           # of the 0.9 left: 0.44, 0.78
    (dict(min_p=0.6), [2, 0]),                     # at least 0.24
    (dict(min_p=0.8), [2]),
    (dict(top_p=0.75, temperature=0.5), [2, 0]),   # squares: 0.53, 0.83
    (dict(min_p=0.6, temperature=0.5), [2]),       # 0.09 of 0.16
    (dict(min_p=0.6, temperature=4.0), [2, 0, 3, 1]),
    (dict(top_k=3, top_p=0.75, min_p=0.8), [2]),
    (dict(top_p=0.85, support=2), [2, 0]),         # of the 0.7 of two candidates: 0.57, 1
    (dict(top_p=0.55, support=2), [2]),
])
def test_support_by_hand(options, kept):
  out = draw(MARKOV, HAND, [[0]], group=50, max_tokens=2, **(dict(support=4) | options))

  size = min(options.get('support', 4), options.get('top_k', 4))
  assert out.support.shape == (50, 2, size)
  expected = kept + [-1] * (size - len(kept))
  np.testing.assert_array_equal(out.support, np.broadcast_to(expected, (50, 2, size)))
  weight = np.array([0.3, 0.1, 0.4, 0.2]) ** (1 / options.get('temperature', 1.0))
  share = weight[out.tokens] / weight[kept].sum()
  np.testing.assert_allclose(out.logp, np.log(share), rtol=1e-5, atol=1e-6)
  assert set(out.tokens.flat) == set(kept)


def test_impossible_ids_are_not_recorded():
  out = draw(MARKOV, HAND.at[:, 1].set(-jnp.inf), [[0]], group=50, max_tokens=2, top_k=4, support=4)
  np.testing.assert_array_equal(out.support, np.broadcast_to([2, 0, 3, -1], (50, 2, 4)))


def test_top_p_of_1_cuts_nothing_that_another_option_keeps():
  """With many ids the mass before the last ones is rounded to 1 and above."""
  logits = jax.random.normal(jax.random.key(0), (64, 64)) * 4
  out = draw(MARKOV, logits, [[n] for n in range(64)], max_tokens=1, min_p=1e-12, support=64)
  z = np.asarray(logits, np.float64)
  expected = (np.exp(z - z.max(axis=1, keepdims=True)) >= 1e-12).sum(axis=1)
  np.testing.assert_array_equal((out.support[:, 0] >= 0).sum(axis=1), expected)


# When rows end


def test_eos_ends_a_row_and_is_its_last_token():
  script = jnp.array([[3, 4, 2, 5, 5], [2, 3, 3, 3, 3], [3, 3, 3, 3, 7], [4, 4, 4, 4, 4]])

  out = draw(SCRIPT, script, [[0]] * 4, max_tokens=5, eos=(2, 7), top_k=2, support=2)

  np.testing.assert_array_equal(out.length, [3, 1, 5, 5])
  np.testing.assert_array_equal(out.stopped, [True, True, True, False])
  inside = np.arange(5) < out.length[:, None]
  np.testing.assert_array_equal(out.tokens, np.where(inside, script, 0))
  np.testing.assert_array_equal(out.support[..., 0], np.where(inside, script, -1))
  np.testing.assert_array_equal(out.logp, 0)


def test_log_probabilities_behind_the_end_are_0():
  out = draw(MARKOV, jnp.zeros((4, 4)), [[0]], group=64, max_tokens=8, eos=(1,))
  inside = np.arange(8) < out.length[:, None]
  assert 0 < inside.mean() < 1
  np.testing.assert_allclose(out.logp, np.where(inside, -math.log(4), 0), rtol=1e-6)


def ends_at(words, tokens, stop):
  """Tokens up to the one that completes a stop string; all of them if none does."""
  for n in range(1, len(tokens) + 1):
    said = b''.join(words[t] for t in tokens[:n])
    if any(text in said for text in stop):
      return n, True
  return len(tokens), False


WORDS = [b'', b'a', b'b', b'aab', b'ba', b'\xc3', b'\xa9\n', b'b\xc3\xa9ab']


@pytest.mark.parametrize('stop, said, length', [
    ((b'b',), [1, 1, 2, 1], 3),
    ((b'b',), [1, 3, 1, 1], 2),                    # in a longer token
    ((b'ab',), [1, 2, 1, 1], 2),                   # over two tokens
    ((b'aba',), [1, 0, 2, 0, 0, 1, 1], 6),         # over three, and ids without bytes between them
    ((b'aaab',), [1, 1, 1, 2, 1], 4),
    ((b'aab',), [1, 1, 1, 2, 1], 4),               # a match that begins one byte after a failed one
    (('é'.encode(),), [2, 5, 6, 1], 3),            # a character over two tokens
    (('é'.encode(),), [1, 7, 1], 2),
    ((b'\xa9ab',), [1, 7, 1], 2),                  # at the end of the longest token
    ((b'ba', b'aa'), [1, 1, 2], 2),
    ((b'aabaab',), [3, 1, 3, 3, 1], 4),            # aabaaab does not do, aabaaabaab does
    ((b'bbbb', b'aa'), [2, 1, 2, 2, 2, 1], 6),
    ((b'\x00',), [0, 0, 0], 3),                    # the padding of the table is not a byte
])
def test_stop_strings_by_hand(stop, said, length):
  assert (length, length < len(said) or ends_at(WORDS, said, stop)[1]) == ends_at(WORDS, said, stop)

  out = draw(SCRIPT, jnp.array([said]), [[1]], temperature=0.0, max_tokens=len(said), stop=stop,
             table=sample.pack_bytes(WORDS, VOCAB))

  assert (out.length[0], bool(out.stopped[0])) == ends_at(WORDS, said, stop)


@pytest.mark.parametrize('longest', [1, 4])
def test_stop_strings_are_exact(longest):
  """Random tokens of random bytes, in 200 rows, against Python's substring search."""
  rng = np.random.default_rng(longest)
  text = lambda most: bytes(rng.integers(97, 99, rng.integers(0, most)).astype(np.uint8))
  words = [text(longest + 1) for _ in range(VOCAB - 1)]      # fewer than the model has ids
  stop = tuple(text(6) + end for end in (b'a', b'b', b'aa'))
  said = rng.integers(0, VOCAB, (200, 12))

  out = draw(SCRIPT, jnp.asarray(said), [[0]] * 200, temperature=0.0, max_tokens=12, stop=stop,
             table=sample.pack_bytes(words, VOCAB))

  expected = [ends_at([*words, b''], row, stop) for row in said]
  np.testing.assert_array_equal(out.length, [n for n, _ in expected])
  np.testing.assert_array_equal(out.stopped, [s for _, s in expected])


def test_the_prompt_is_not_searched_for_stop_strings():
  out = draw(SCRIPT, jnp.array([[2, 1, 2]]), [[1, 1]], temperature=0.0, max_tokens=3, stop=(b'ab',),
             table=sample.pack_bytes(WORDS, VOCAB))
  assert out.length[0] == 3


def test_decoding_ends_with_the_last_row():
  steps = []

  def step(params, tokens, cache):
    jax.debug.callback(lambda: steps.append(None))
    return SCRIPT.step(params, tokens, cache)

  decoder = SCRIPT._replace(step=step)
  for length in (1, 2, 5, 8):
    script = np.full((3, 8), 3)
    script[:, length - 1] = 1
    script[0, 0] = 1
    steps.clear()
    out = draw(decoder, jnp.asarray(script), [[0]] * 3, temperature=0.0, max_tokens=8, eos=(1,))
    jax.effects_barrier()
    np.testing.assert_array_equal(out.length, [1, length, length])
    assert len(steps) == length - 1    # the first token comes from the prefill


# What must not matter


PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3], [5]]
KEYS = jax.random.split(jax.random.key(7), len(PROMPTS))
OPTIONS = [dict(), dict(top_p=0.9, support=6)]


@pytest.mark.parametrize('options', OPTIONS)
def test_a_row_does_not_depend_on_the_others(options):
  run = functools.partial(draw, MEMORY, MEMORY_PARAMS, slots=5, max_tokens=7, eos=(4,), **options)
  whole = run(PROMPTS, group=3, keys=KEYS)
  for n, prompt in enumerate(PROMPTS):
    alone = run([prompt], group=2, keys=KEYS[n:n + 1])
    for a, w in zip(alone, whole):
      if a is not None:
        np.testing.assert_allclose(a, w[3 * n:3 * n + 2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('options', OPTIONS)
def test_padding_and_max_tokens_do_not_matter(options):
  short = draw(MEMORY, MEMORY_PARAMS, PROMPTS, keys=KEYS, max_tokens=4, **options)
  longer = draw(MEMORY, MEMORY_PARAMS, PROMPTS, keys=KEYS, max_tokens=9, slots=11, **options)
  np.testing.assert_array_equal(short.tokens, longer.tokens[:, :4])
  np.testing.assert_allclose(short.logp, longer.logp[:, :4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('options', OPTIONS)
def test_the_mesh_does_not_matter(options):
  prompts, keys = PROMPTS * 2, jax.random.split(jax.random.key(3), 8)
  expected = draw(MEMORY, MEMORY_PARAMS, prompts, keys=keys, group=2, max_tokens=6, eos=(4,),
                  **options)
  mesh = jax.make_mesh((8,), ('data',), (AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec('data'))

  out = sample.sample(
      MEMORY, MEMORY_PARAMS, *jax.device_put(pad_left(prompts, 5), rows),
      jax.device_put(keys, rows), group=2, sampling=Sampling(max_tokens=6, eos=(4,), **options))

  assert len(out.tokens.sharding.device_set) == 8
  for a, e in zip(out, expected):
    if a is not None:
      np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


def test_noise_is_the_key_and_nothing_else():
  run = functools.partial(draw, MEMORY, MEMORY_PARAMS, PROMPTS, group=4, max_tokens=12)
  first, again, other = run(seed=1), run(seed=1), run(seed=2)
  for a, b in zip(first, again):
    np.testing.assert_array_equal(a, b)
  assert (first.tokens != other.tokens).mean() > 0.2


def test_rows_of_a_group_differ_and_share_one_prefill():
  rows = []

  def prefill(params, tokens, start, length):
    rows.append((tokens.shape, length))
    return MEMORY.prefill(params, tokens, start, length)

  out = draw(MEMORY._replace(prefill=prefill), MEMORY_PARAMS, PROMPTS, group=6, max_tokens=10)

  assert rows == [((4, 5), 14)]        # the last token is never read, so it has no slot
  for n in range(4):
    assert len(np.unique(out.tokens[6 * n:6 * n + 6], axis=0)) == 6


def test_what_the_decoder_tells_of_a_token_stands_where_the_token_stands():
  def prefill(params, tokens, start, length):
    return *MEMORY.prefill(params, tokens, start, length)[:2], {'read': tokens.astype(jnp.int8)}

  def step(params, tokens, cache):
    return *MEMORY.step(params, tokens, cache)[:2], {'read': tokens.astype(jnp.int8)}

  out = draw(Decoder(prefill, step, repeat), MEMORY_PARAMS, PROMPTS, group=3, max_tokens=9,
             eos=(4, 18))

  np.testing.assert_array_equal(out.prompt_extras['read'], pad_left(PROMPTS, 5)[0])
  assert out.extras['read'].dtype == np.int8 and len(set(out.length)) > 2
  read = np.arange(9) < out.length[:, None] - 1
  np.testing.assert_array_equal(
      np.where(read, out.extras['read'], 0), np.where(read, out.tokens, 0))


def test_numbers_change_without_compiling_anew():
  traces = []

  def step(params, tokens, cache):
    traces.append(None)
    return MEMORY.step(params, tokens, cache)

  run = functools.partial(
      draw, MEMORY._replace(step=step), MEMORY_PARAMS, PROMPTS, max_tokens=4, support=5)
  run(temperature=1.0, top_p=0.9)
  once = len(traces)
  run(temperature=0.7, top_p=0.9, seed=5)
  run(temperature=0.7, top_p=0.5)
  run(temperature=0.7, min_p=0.1)
  assert len(traces) == once > 0


# What is refused


@pytest.mark.parametrize('options, message', [
    (dict(max_tokens=0), 'max_tokens is 0'),
    (dict(temperature=-1.0), 'temperature is -1.0'),
    (dict(temperature=math.inf), 'temperature is inf'),
    (dict(temperature=math.nan), 'temperature is nan'),
    (dict(top_k=-1), 'top_k is -1'),
    (dict(top_p=0.0), 'top_p is 0.0'),
    (dict(top_p=1.5), 'top_p is 1.5'),
    (dict(min_p=-0.1), 'min_p is -0.1'),
    (dict(min_p=1.1), 'min_p is 1.1'),
    (dict(support=-1), 'support is -1'),
    (dict(top_k=40), 'support=40'),
    (dict(top_p=0.9), 'set support'),
    (dict(min_p=0.1), 'set support'),
    (dict(eos=(1, -1)), 'negative id'),
    (dict(stop=('text',)), 'non-empty bytes'),
    (dict(stop=(b'',)), 'non-empty bytes'),
])
def test_options_that_make_no_sense_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**(dict(max_tokens=4) | options))


@pytest.mark.parametrize('options, message', [
    (dict(group=0), 'group is 0'),
    (dict(stop=(b'a',)), 'need token_bytes'),
    (dict(stop=(b'a',), table=sample.pack_bytes(WORDS, 9)), 'knows 9 ids, the model 19'),
    (dict(eos=(19,)), 'outside the vocabulary of 19'),
    (dict(top_p=0.9, support=20), '20 candidates .* of a vocabulary of 19'),
    (dict(keys=KEYS[:2]), 'keys'),
    (dict(keys=jax.random.split(jax.random.key(0, impl='rbg'), 4)), 'wanted threefry2x32'),
])
def test_calls_that_cannot_be_served_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    draw(MEMORY, MEMORY_PARAMS, PROMPTS, max_tokens=2, **options)


def test_a_tokenizer_larger_than_the_model_is_refused():
  with pytest.raises(ValueError, match='tokenizer has 8 ids, the model 7'):
    sample.pack_bytes(WORDS, 7)


# With the model


CFG = ModelConfig(
    vocab_size=37, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, ffw_dim=24, repeats=2,
    max_length=32)


def model_prefill(params, tokens, start, length):
  hidden, cache, _ = model.prefill(params, CFG, tokens, start, length)
  return model.unembed(params, CFG, hidden), cache, None


def model_step(params, tokens, cache):
  hidden, cache, _ = model.step(params, CFG, tokens, cache)
  return model.unembed(params, CFG, hidden), cache, None


MODEL = Decoder(model_prefill, model_step, model.repeat_cache)


@jax.jit
def scored(params, batch):
  output = model.forward(params, CFG, batch.tokens, batch.positions, batch.segments)
  return score.score(params, CFG, output, batch, (LOGP,))[LOGP]


@pytest.mark.parametrize('options', [
    dict(), dict(temperature=0.6), dict(temperature=0.0), dict(top_k=9, support=9),
    dict(top_p=0.8, min_p=0.05, support=9, temperature=1.7),
])
def test_sampler_and_trainer_agree_on_log_probabilities(options):
  """Ragged prompts, groups, rows that end early; under truncation on the recorded support."""
  params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0), CFG))
  prompts, group, size = [[3, 1, 4, 1], [5], [9, 2, 6, 5, 3, 5, 8]], 3, 20
  sampling = Sampling(max_tokens=9, eos=(7, 11), **options)
  out = draw(MODEL, params, prompts, group=group, **dataclasses.asdict(sampling))
  assert sampling.temperature == 0 or len(set(out.length)) > 1

  tokens, segments = np.zeros((9, size), np.int32), np.zeros((9, size), np.int32)
  sampled, inside = np.zeros((9, size), np.float32), np.zeros((9, size), bool)
  support = np.full((9, size, sampling.candidates), -1, np.int32)
  for n, length in enumerate(out.length):
    begin = len(prompts[n // group])
    response = np.s_[n, begin:begin + length]
    tokens[n, :begin], tokens[response] = prompts[n // group], out.tokens[n, :length]
    segments[n, :begin + length], inside[response] = 1, True
    sampled[response] = out.logp[n, :length]
    if out.support is not None:
      support[response] = out.support[n, :length]
  batch = Batch(
      tokens=tokens, positions=np.tile(np.arange(size, dtype=np.int32), (9, 1)), segments=segments,
      masks={}, weights={}, coef={}, data={}, temperature=np.float32(sampling.temperature or 1.0),
      use=np.int32(0), support=None if out.support is None else support)

  logp = np.asarray(scored(params, batch))

  # Measured: 2e-6 at most.
  np.testing.assert_allclose(logp[inside], sampled[inside], atol=2e-5)
