"""A policy small enough to enumerate, and just enough of a driver to run a Method on it.

V tokens, N rows, T positions; position 0 is the prompt. A token depends on the one before it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nn.types import ENTROPY, LOGP, Batch, Want
from rl import losses
from rl.types import OLD, REFERENCE, SAMPLER, Record, Rows, View, label

V, T = 4, 6


@pytest.fixture(autouse=True)
def strict_ranks():
  """[n] against [n, T] meets only by mistake, and would broadcast the wrong way."""
  with jax.numpy_rank_promotion('raise'):
    yield


def policy(seed, spread=1.0):
  """Parameters: logits of the next token, [V, V]."""
  return jnp.asarray(spread * np.random.default_rng(seed).standard_normal((V, V)), jnp.float32)


def scores(params, tokens):
  """{Want: [N, T]}; 0 at position 0."""
  logp = jax.nn.log_softmax(params)[tokens[:, :-1]]
  pad = lambda x: jnp.pad(x, ((0, 0), (1, 0)))
  taken = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
  return {LOGP: pad(taken), ENTROPY: pad(-jnp.sum(jnp.exp(logp) * logp, axis=-1))}


def record(rewards, group, mask=None, seed=0, **fields):
  """A Record of random rows with these rewards, [N] each; trains whole responses unless masked."""
  num = len(group)
  tokens = np.random.default_rng(seed).integers(0, V, (num, T)).astype(np.int32)
  train = np.ones((num, T), np.float32) if mask is None else np.asarray(mask, np.float32)
  if mask is None:
    train[:, 0] = 0
  rows = Rows(tokens, np.ones(num, int), np.full(num, T), np.zeros((num, T), np.float32),
              np.asarray(group))
  return Record(0, {}, rows=rows, masks={'train': train},
                reward={k: np.asarray(v, float) for k, v in rewards.items()}, **fields)


def passes(rec, *, old, sampler=None, reference=None):
  """The record with the log-probabilities of other policies, 0 outside the response."""
  inside = rec.masks['train'] > 0
  read = lambda p: np.where(inside, np.asarray(scores(p, rec.rows.tokens)[LOGP]), np.float32(0))
  given = {OLD: old, SAMPLER: old if sampler is None else sampler,
           REFERENCE: old if reference is None else reference}
  return dataclasses.replace(rec, results={k: read(p) for k, p in given.items()})


def run(method, rec):
  for stage in method.stages:
    rec = stage.run(rec)
  return rec


def batch(method, rec):
  """All rows as one optimiser step."""
  weights = {}
  for term in method.terms:
    weight, extra = term.aggregate(rec.masks[term.mask]), rec.weight.get(term.name, np.ones(1))
    weight = weight * (extra[:, None] if extra.ndim == 1 else extra)
    weights[term.name] = weight.astype(np.float32)
  needs = [n for term in method.terms for n in term.needs if not isinstance(n, Want)]
  return Batch(
      tokens=rec.rows.tokens, positions=None, segments=None, masks=rec.masks, weights=weights,
      coef={t.name: t.coef for t in method.terms}, data={label(n): rec.results[n] for n in needs},
      temperature=1.0, use=0, advantage=rec.advantage)


def loss(terms, params, step):
  """Sum over terms of coef * sum(weight * value), and every term's values and metrics."""
  read = scores(params, step.tokens)
  total, seen = 0.0, {}
  for term in terms:
    given = {n: read[n] if isinstance(n, Want) else step.data[label(n)] for n in term.needs}
    value, metrics = term.value(View(given, step, step.masks[term.mask], {}, None))
    total += step.coef[term.name] * losses.weighted_sum(value, step.weights[term.name])
    seen[term.name] = (value, metrics)
  return total, seen


def gradient(method, rec, params):
  """(gradient [V, V], loss) after the method's stages; jitted, as in training."""
  step = batch(method, run(method, rec))
  both = jax.jit(jax.value_and_grad(lambda p: loss(method.terms, p, step)[0]))
  value, slope = both(params)
  return np.asarray(slope), np.asarray(value)
