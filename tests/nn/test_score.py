"""Scores against float64 log-softmax: every kind, temperature, supports, chunks.

And what a train step never holds.
"""

import dataclasses

import jax
import jax.numpy as jnp
import nn_tiny as tiny
import numpy as np
import pytest
from jax.extend import core

from nn import model, param, score
from nn.types import ENTROPY, LOGP, Output, Want, at, fixed, topk

CFG = tiny.config(vocab_size=17, embed_dim=8)
WANTS = (LOGP, ENTROPY, at('teacher'), fixed(3), topk(4))
# Two segments and padding; a row that starts with padding.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]])
# Where there is something to predict from.
INSIDE = np.array([[0, 1, 1, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1]], bool)
LENGTH = SEGMENTS.shape[1]


def example(**fields):
  """Parameters, hidden states [2, 9, 8] and a batch with ids to ask about."""
  rng = np.random.default_rng(0)
  params = {'embed': {'table': jnp.asarray(rng.standard_normal((17, 8)), jnp.float32)}}
  hidden = jnp.asarray(rng.standard_normal((2, LENGTH, 8)), jnp.float32)
  ids = np.stack([rng.permutation(17)[:3] for _ in range(2 * LENGTH)]).reshape(2, LENGTH, 3)
  rows = tiny.batch(
      tiny.tokens(2, LENGTH, 17), SEGMENTS, data={'teacher': (jnp.asarray(ids),)}, **fields)
  return params, hidden, rows


def scores(params, hidden, rows, wants, cfg=CFG):
  return jax.jit(lambda p, h, b: score.score(p, cfg, Output(hidden=h), b, wants))(
      params, hidden, rows)


def logp64(params, hidden, temperature=1.0):
  """Log-probabilities of the token at each index given the one before: [2, 9, 17] float64.

  Index 0 is not to be used.
  """
  logits = (np.asarray(hidden, np.float64)
            @ np.asarray(params['embed']['table'], np.float64).T / temperature)
  logits = np.roll(logits, 1, axis=1)
  top = logits.max(axis=-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)), logits


def check(actual, expected):
  """Equal where there is something to predict from, 0 elsewhere."""
  actual = np.asarray(actual)
  inside = INSIDE.reshape(INSIDE.shape + (1,) * (actual.ndim - 2))
  np.testing.assert_allclose(actual, np.where(inside, expected, 0), atol=3e-6)


@pytest.mark.parametrize('chunk', [0, 1, 4])
@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_every_kind_matches_float64(temperature, chunk):
  params, hidden, rows = example(temperature=jnp.float32(temperature))
  out = scores(params, hidden, rows, WANTS, dataclasses.replace(CFG, score_chunk=chunk))
  logp, logits = logp64(params, hidden, temperature)
  ids = np.asarray(rows.data['teacher'][0])
  rest = lambda left_out: np.log(np.where(left_out, 0, np.exp(logp)).sum(axis=-1))

  check(out[LOGP], np.take_along_axis(logp, np.asarray(rows.tokens)[..., None], -1)[..., 0])
  check(out[ENTROPY], -(np.exp(logp) * logp).sum(axis=-1))
  of_ids, of_others = out[at('teacher')]
  check(of_ids, np.take_along_axis(logp, ids, -1))
  check(of_others, rest((np.arange(17) == ids[..., None]).any(axis=2)))
  of_three, normaliser = out[fixed(3)]
  check(of_three, logp[..., 3])
  check(normaliser, np.log(np.exp(np.delete(logits, 3, axis=-1)).sum(axis=-1)))
  best, best_logp = out[topk(4)]
  order = np.argsort(-logp, axis=-1)[..., :4]
  check(best, order)
  check(best_logp, np.take_along_axis(logp, order, -1))


@pytest.mark.parametrize('chunk', [0, 4])
def test_a_support_renormalises_log_probability_and_entropy(chunk):
  params, hidden, rows = example(temperature=jnp.float32(0.7))
  tokens = np.asarray(rows.tokens)
  support = np.full((2, LENGTH, 4), -1)
  support[..., 0] = (tokens + 5) % 17
  support[..., 2] = tokens                       # -1 may stand anywhere
  support[0, 4] = -1                             # every id
  support[1, 5, 2] = (tokens[1, 5] + 2) % 17     # the token taken is not in its support
  whole = np.zeros((2, LENGTH), bool)
  whole[0, 4] = whole[1, 5] = True

  logp, _ = logp64(params, hidden, 0.7)
  allowed = whole[..., None] | (np.arange(17) == support[..., None]).any(axis=2)
  share = np.where(allowed, np.exp(logp), 0)
  share /= share.sum(axis=-1, keepdims=True)
  out = scores(
      params, hidden, rows.replace(support=jnp.asarray(support)), (LOGP, ENTROPY, fixed(3)),
      dataclasses.replace(CFG, score_chunk=chunk))
  check(out[LOGP], np.log(np.take_along_axis(share, tokens[..., None], -1)[..., 0]))
  check(out[ENTROPY],
        -np.where(share > 0, share * np.log(np.maximum(share, 1e-300)), 0).sum(axis=-1))
  check(out[fixed(3)][0], logp[..., 3])          # asked of the whole distribution


def dense(params, hidden, rows):
  """Every kind from all logits at once, by plain autodiff in float64, in the order of WANTS.

  Index 0 is cut off.
  """
  logits = jnp.einsum('btd,vd->btv', hidden[:, :-1], params['embed']['table']) / 0.7
  logp = jax.nn.log_softmax(logits)
  tokens, ids = rows.tokens[:, 1:], rows.data['teacher'][0][:, 1:]
  others = 1 - jax.nn.one_hot(ids, 17).sum(axis=2)
  own = logp if rows.support is None else jax.nn.log_softmax(
      jnp.where(jax.nn.one_hot(rows.support[:, 1:], 17).sum(axis=2) > 0, logits, -1e9))
  return [jnp.take_along_axis(own, tokens[..., None], -1)[..., 0],
          -jnp.sum(jnp.exp(own) * own, axis=-1),
          jnp.take_along_axis(logp, ids, -1), jnp.log(jnp.sum(others * jnp.exp(logp), axis=-1)),
          logp[..., 3], jax.nn.logsumexp(jnp.delete(logits, 3, axis=-1), axis=-1),
          jax.lax.top_k(logp, 4)[0]]


@pytest.mark.parametrize('with_support', [False, True])
@pytest.mark.parametrize('chunk', [0, 4])
def test_gradients_of_every_kind_match_float64(with_support, chunk):
  params, hidden, rows = example(temperature=jnp.float32(0.7))
  if with_support:
    taken = np.asarray(rows.tokens)
    rows = rows.replace(support=jnp.asarray(
        np.stack([taken, (taken + 1) % 17, np.full_like(taken, -1)], axis=-1)))
  rng = np.random.default_rng(3)

  def total(values, weights):
    return sum(jnp.sum(w * x) for w, x in zip(weights, values, strict=True))

  def ours(params, hidden):
    values = score.score(
        params, dataclasses.replace(CFG, score_chunk=chunk), Output(hidden=hidden), rows, WANTS)
    floats = [x for want in WANTS for x in jax.tree.leaves(values[want]) if x.dtype == jnp.float32]
    return total([x[:, 1:] for x in floats], weights)

  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, hidden))
    shapes = jax.eval_shape(lambda: dense(*wide, rows))
    weights = [rng.standard_normal(x.shape) * INSIDE[:, 1:].reshape(2, -1, *(1,) * (x.ndim - 2))
               for x in shapes]
    expected = jax.jit(jax.grad(lambda p, h: total(dense(p, h, rows), weights), (0, 1)))(*wide)
  weights = [jnp.asarray(w, jnp.float32) for w in weights]
  actual = jax.jit(jax.grad(ours, (0, 1)))(params, hidden)
  for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, e, atol=3e-6 * np.abs(e).max())


def test_one_position_scores_zero():
  params, hidden, _ = example()
  rows = tiny.batch([[3], [4]])
  np.testing.assert_array_equal(
      scores(params, hidden[:, :1], rows, (LOGP, ENTROPY))[LOGP], np.zeros((2, 1)))


def test_an_id_that_cannot_be_sampled_leaves_all_finite():
  params, hidden, rows = example()
  far = {'embed': {'table': params['embed']['table'].at[3].set(-1e4 * jnp.sign(hidden[0, 0]))}}
  def total(params, hidden):
    return sum(jnp.sum(x) for x in jax.tree.leaves(scores(params, hidden, rows, WANTS))
               if x.dtype == jnp.float32)
  value, grads = jax.value_and_grad(total, (0, 1))(far, hidden)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, grads)))


def test_what_the_model_cannot_answer_is_refused():
  params, hidden, rows = example()
  with pytest.raises(ValueError, match=r"nothing in this model answers \['mood'\]"):
    scores(params, hidden, rows, (LOGP, Want('mood')))


def arrays_in(jaxpr):
  """Shapes of everything a program computes, inner programs included."""
  for eqn in jaxpr.eqns:
    yield from (v.aval.shape for v in eqn.outvars if hasattr(v.aval, 'shape'))
    for inner in core.jaxprs_in_params(eqn.params):
      yield from arrays_in(inner)


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_train_step_never_holds_all_logits(remat):
  cfg = tiny.config(vocab_size=5003, max_length=4096, remat=remat)
  rows = jax.eval_shape(lambda: tiny.batch(np.zeros((4, 4096))))
  rows = rows.replace(support=jax.ShapeDtypeStruct((4, 4096, 2), jnp.int32))

  def loss(params, rows):
    out = tiny.forward(params, cfg, rows)
    return sum(jnp.sum(x) for x in score.score(params, cfg, out, rows, (LOGP, ENTROPY)).values())

  program = jax.make_jaxpr(jax.grad(loss))(param.abstract(model.specs(cfg)), rows)
  logits = [int(np.prod(shape)) // 5003
            for shape in arrays_in(program.jaxpr) if shape[-1:] == (5003,)]
  assert 0 < max(logits) * 4 * 5003 <= score.CHUNK_BYTES


def test_a_chunk_size_of_the_config_is_kept_to():
  params, hidden, rows = example()
  cfg = dataclasses.replace(CFG, score_chunk=4)
  program = jax.make_jaxpr(lambda p, h, b: score.score(p, cfg, Output(hidden=h), b, (LOGP,)))(
      params, hidden, rows)
  # Nine positions in three chunks of equal size.
  assert max(int(np.prod(shape)) for shape in arrays_in(program.jaxpr)
             if shape[-1:] == (17,)) == 2 * 3 * 17


def test_small_logits_are_computed_at_once_but_not_kept():
  cfg = tiny.config(vocab_size=23)
  assert score.chunk_size(cfg, 4, 64) == 64
  rows = jax.eval_shape(lambda: tiny.batch(np.zeros((4, 64))))

  def kept(params, hidden, rows):
    run = lambda p, h: score.score(p, cfg, Output(hidden=h), rows, (LOGP, ENTROPY))
    return jax.vjp(run, params, hidden)[1]

  hidden = jax.ShapeDtypeStruct((4, 64, 16), jnp.float32)
  residuals = jax.eval_shape(kept, param.abstract(model.specs(cfg)), hidden, rows)
  assert max(x.size for x in jax.tree.leaves(residuals)) < 4 * 64 * 23


@pytest.mark.parametrize('vocab_size, rows, expected', [
    # 16 MB would be 64 tokens; with fewer than 512 tokens reading the table dominates
    (2**16, 8, 64),
    (2**10, 8, 512),      # 4096 tokens of 4 KB
    (2**10, 2**13, 1),
])
def test_size_of_a_chunk(vocab_size, rows, expected):
  assert score.chunk_size(tiny.config(vocab_size=vocab_size), rows, 10**6) == expected
