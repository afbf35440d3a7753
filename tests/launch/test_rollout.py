"""The driver of a rollout.

Passes are shared, groups stay whole, batches keep their shape, alignment survives contexts.
"""

import dataclasses

import jax
import numpy as np
import pytest

from launch import rollout
from nn.types import ENTROPY, LOGP
from rl import compose, pieces
from rl.types import (
    OLD, POLICY, REFERENCE, SAMPLER, Context, Generate, Method, Record, Rows, Score, Source, Stage,
    Term, Texts, label)

V, GROUP, PROMPTS, MAX_TOKENS = 7, 4, 3, 6
KEY = jax.random.key(0)
TABLE = {name: np.random.default_rng(seed).normal(size=(V, V))
         for seed, name in enumerate(('policy', 'reference'))}


def logp_of(table, tokens):
  """Log-probability of every token after the one before it, and entropy.

  Index t is about tokens[:, t].
  """
  z = table[tokens[:, :-1] % V]
  z = z - np.log(np.exp(z).sum(-1, keepdims=True))
  taken = np.take_along_axis(z, tokens[:, 1:, None] % V, 2)[..., 0]
  pad = lambda x: np.pad(x, ((0, 0), (1, 0))).astype(np.float32)
  return {LOGP: pad(taken), ENTROPY: pad(-(np.exp(z) * z).sum(-1))}


def engine(log):
  def sample(source, prompts, group, sampling, key):
    log.append(('sample', source.name, len(prompts)))
    seed = int(jax.random.bits(key)) % 1000
    rng = np.random.default_rng(seed)
    begin = np.repeat([len(p) for p in prompts], group)
    end = begin + rng.integers(1, sampling['max_tokens'] + 1, len(begin))
    tokens = rng.integers(0, V, (len(begin), 16 + sampling['max_tokens'])).astype(np.int32)
    for n, b in enumerate(begin):
      tokens[n, :b], tokens[n, end[n]:] = prompts[n // group], 0
    logp = rollout.place(
        logp_of(TABLE['policy'], tokens)[LOGP], begin, begin, end - begin, tokens.shape[1])
    return Rows(tokens, begin, end, logp, np.repeat(np.arange(len(prompts)), group),
                routes={3: tokens[..., None]}, info={'stopped': end > 0})

  def score(source, tokens, end, support, routes, data, wants, temperature):
    log.append(('score', source.name, tuple(w.kind for w in wants)))
    # Other weights choose for themselves, and in another context so does the policy.
    rows_as_they_are = tokens.shape[1] == 16 + MAX_TOKENS
    assert (routes is not None) == (source == POLICY and rows_as_they_are)
    if routes is not None:
      np.testing.assert_array_equal(routes[3][..., 0], tokens)
    return {w: logp_of(TABLE[source.name], tokens)[w] for w in wants}

  return rollout.Engine(sample, lambda text: [ord(c) % V for c in text], score)


def task(
    rewards=lambda rows, attempt: rows.tokens[:, -1] * 0 + np.arange(len(rows.start)) % 2,
    attempts=None,
):
  attempts = [] if attempts is None else attempts

  def ask(record):
    cursor = record.state['prompts']['cursor']
    prompts = tuple({'tokens': [1 + (cursor + i) % 5] * (2 + i)} for i in range(PROMPTS))
    return dataclasses.replace(
        record, prompts=prompts,
        state=record.state | {'prompts': {'cursor': cursor + PROMPTS}})

  def answer(record, engine, key):
    rows = engine.sample(POLICY, [p['tokens'] for p in record.prompts], GROUP, record.sampling, key)
    rows = dataclasses.replace(rows, group=record.state['prompts']['cursor'] - PROMPTS + rows.group)
    where = np.arange(rows.tokens.shape[1])
    mask = ((where >= rows.start[:, None]) & (where < rows.end[:, None])).astype(np.float32)
    attempts.append(len(attempts))
    return dataclasses.replace(record, rows=rows, masks={'train': mask}, reward={'task': np.asarray(
        rewards(rows, attempts[-1]), float)}, notes={'seen': len(rows.start)})

  return rollout.Task(ask, answer)


def collect(method, log=None, rewards=None, num_rows=PROMPTS * GROUP, refills=3, **options):
  record = Record(
      5, {'prompts': {'cursor': 0}} | method.state, {'temperature': 1.0, 'max_tokens': MAX_TOKENS})
  made = task(rewards) if rewards else task()
  return rollout.collect(
      method, engine([] if log is None else log), made, record, num_rows, KEY, refills, **options)


GRPO = compose.compose(pieces.group_advantage(), pieces.policy())


def test_scores_of_one_source_are_one_pass():
  log = []
  extra = Term('h', lambda v: (v.given[LOGP], {}), (LOGP, Score(POLICY, ENTROPY)))
  record = collect(compose.ready(compose.compose(GRPO, pieces.kl(), Method(terms=(extra,)))), log)
  assert log == [
      ('sample', 'policy', PROMPTS), ('score', 'policy', ('entropy', 'logp')),
      ('score', 'reference', ('logp',))]
  np.testing.assert_allclose(record.results[OLD], record.rows.logp, atol=1e-6)


def test_no_pass_for_old_where_rows_are_used_once():
  log = []
  record = collect(compose.ready(GRPO), log, once=True)
  assert [kind for kind, *_ in log] == ['sample']
  batch, = rollout.minibatches(compose.ready(GRPO), record, 1, 1, 0)
  assert label(OLD) not in batch.data


def test_a_stage_still_gets_its_pass():
  log = []
  collect(compose.ready(compose.compose(GRPO, pieces.tis())), log, once=True)
  assert ('score', 'policy', ('logp',)) in log


def test_results_stand_where_the_response_stands_whatever_the_context():
  told = Score(POLICY, LOGP, Context('told', lambda r: Texts(tuple(
      ('abc', row[:s].tolist()) for row, s in zip(r.rows.tokens, r.rows.start)))))
  term = Term('t', lambda v: (v.given[LOGP], {}), (LOGP, told))
  record = collect(compose.ready(compose.compose(GRPO, Method(terms=(term,)))))
  train = record.masks['train'] > 0
  # The toy policy sees one token back, so only the text just before the response could matter, and
  # it is the same.
  np.testing.assert_allclose(
      record.results[told], np.where(train, record.results[OLD], 0), atol=1e-6)


def test_own_targets_come_back_from_the_start():
  answer = Score(POLICY, LOGP, Context('answer', lambda r: Texts(
      tuple((row[:s].tolist(),) for row, s in zip(r.rows.tokens, r.rows.start)),
      tuple(('ab',) for _ in r.rows.start))))
  record = collect(compose.ready(compose.compose(
      GRPO, Method(stages=(Stage('x', 'add', lambda r: r, (answer,)),)))))
  got, row = record.results[answer], record.rows.tokens[0, :record.rows.start[0]]
  whole = np.array([[*row, ord('a') % V, ord('b') % V]])
  assert got.shape == (PROMPTS * GROUP, 2)
  np.testing.assert_allclose(got[0], logp_of(TABLE['policy'], whole)[LOGP][0, -2:], atol=1e-6)


def test_extra_generation_feeds_a_context():
  ask = Generate(POLICY, Context('ask', lambda r: Texts(tuple(
      (row[:e].tolist(), '?') for row, e in zip(r.rows.tokens, r.rows.end)))), 3)
  seen = []

  def look(record):
    seen.append(record.results[ask])
    return record

  record = collect(compose.ready(compose.compose(
      GRPO, Method(stages=(Stage('look', 'add', look, (ask,)),)))))
  samples, = seen
  assert (len(samples.tokens) == len(record.rows.start)
          and all(1 <= len(t) <= 3 for t in samples.tokens))
  assert samples.prefix[0] == (*record.rows.tokens[0, :record.rows.end[0]].tolist(), ord('?') % V)


def only_mixed(record):
  return dataclasses.replace(record, keep=pieces.differs(record.reward['task'], record.rows.group))


FILTERED = compose.ready(compose.compose(
    GRPO, Method(stages=(Stage('mixed', 'filter', only_mixed),))))


def first_group_mixed(rows, attempt):
  """In every draw only the first group is mixed."""
  reward = np.zeros(len(rows.start))
  reward[0] = 1
  return reward


def test_filters_ask_for_more_until_whole_groups_fill_the_batch():
  log = []
  record = collect(FILTERED, log, first_group_mixed, num_rows=2 * GROUP, refills=5)
  assert [kind for kind, *_ in log].count('sample') == 2
  assert (len(np.unique(record.rows.group)) == 2
          and (np.bincount(record.rows.group)[[0, PROMPTS]] == GROUP).all())
  assert record.state['prompts']['cursor'] == 2 * PROMPTS
  assert record.notes['rows_filtered'] == 2 * 2 * GROUP and record.notes['rows_missing'] == 0
  assert record.notes['seen'] == 2 * PROMPTS * GROUP, 'counts of all draws add up'


def test_too_few_rows_keep_the_shape_and_teach_nothing():
  record = collect(FILTERED, None, first_group_mixed, num_rows=3 * GROUP, refills=1)
  assert record.notes['rows_missing'] == GROUP and len(record.rows.start) == 3 * GROUP
  assert (record.masks['train'][:2 * GROUP].any(1).all()
          and not record.masks['train'][2 * GROUP:].any())
  full = collect(FILTERED, None, first_group_mixed, num_rows=2 * GROUP, refills=1)
  small, = rollout.minibatches(FILTERED, full, 1, 1, 0)
  large, = rollout.minibatches(FILTERED, record, 1, 1, 0)
  np.testing.assert_allclose(
      small.weights['policy'].sum(), large.weights['policy'].sum(), rtol=1e-6)
  np.testing.assert_allclose(
      (small.weights['policy'] * small.advantage).sum(),
      (large.weights['policy'] * large.advantage).sum(), atol=1e-6)
  assert np.isfinite(large.advantage).all()


def test_no_row_left_is_no_update():
  record = collect(FILTERED, None, lambda rows, attempt: np.zeros(len(rows.start)), refills=2)
  assert len(record.rows.start) == 0 and record.notes['draws'] == 3


def test_draws_of_a_step_and_of_two_steps_differ():
  drawn = [collect(compose.ready(GRPO)).rows.tokens, collect(compose.ready(GRPO)).rows.tokens]
  np.testing.assert_array_equal(*drawn)
  tries = []
  keep_last = lambda rows, attempt: (tries.append(rows.tokens), first_group_mixed(rows, attempt))[1]
  collect(FILTERED, None, keep_last, num_rows=2 * GROUP)
  assert (tries[0][:, 5:] != tries[1][:, 5:]).any()


def test_whole_groups():
  np.testing.assert_array_equal(
      rollout.whole_groups(np.array([9, 9, 3, 3, 3, 5, 5]), 4), [0, 1, 5, 6])
  np.testing.assert_array_equal(rollout.whole_groups(np.array([3, 9, 3, 9]), 2), [0, 2])


@pytest.mark.parametrize('parts, uses', [(1, 1), (3, 2)])
def test_minibatches_are_complete_and_weighted_by_themselves(parts, uses):
  record = collect(compose.ready(GRPO))
  batches = list(rollout.minibatches(compose.ready(GRPO), record, parts, uses, 0))
  assert (len(batches) == parts * uses
          and [int(b.use) for b in batches] == [u for u in range(uses) for _ in range(parts)])
  for u in range(uses):
    rows = np.concatenate([b.tokens for b in batches[u * parts:(u + 1) * parts]])
    np.testing.assert_array_equal(
        np.sort(rows.view(np.uint32).sum(1)), np.sort(record.rows.tokens.sum(1)))
  for b in batches:
    np.testing.assert_array_equal(b.routes[3][..., 0], b.tokens)
    np.testing.assert_allclose(b.weights['policy'].sum(), 1, rtol=1e-6)
    np.testing.assert_array_equal(b.data[label(OLD)] != 0, b.masks['train'] > 0)


def test_pairs_stay_half_a_batch_apart():
  record = collect(compose.ready(GRPO))
  half = len(record.rows.start) // 2
  pair = np.tile(np.arange(half), 2).astype(np.int32)
  record = dataclasses.replace(record, rows=dataclasses.replace(
      record.rows, tokens=np.repeat(pair[:, None], record.rows.tokens.shape[1], 1)))
  for b in rollout.minibatches(compose.ready(GRPO), record, 3, 1, 1):
    np.testing.assert_array_equal(b.tokens[:len(b.tokens) // 2], b.tokens[len(b.tokens) // 2:])


def test_weights_of_stages_multiply_and_are_not_renormalised():
  half = Method(stages=(Stage('half', 'weight', lambda r: dataclasses.replace(
      r, weight={'policy': np.full(len(r.rows.start), 0.5)}), on=('policy',)),))
  plain, weighted = (next(rollout.minibatches(m, collect(m), 1, 1, 0)) for m in (
      compose.ready(GRPO), compose.ready(compose.compose(GRPO, half))))
  np.testing.assert_allclose(weighted.weights['policy'], plain.weights['policy'] / 2)


def test_segments_end_where_the_row_ends():
  record = collect(compose.ready(GRPO))
  batch, = rollout.minibatches(compose.ready(GRPO), record, 1, 1, 0)
  ends = np.sort(record.rows.end)
  np.testing.assert_array_equal(np.sort(batch.segments.sum(1)), ends)
  np.testing.assert_array_equal(np.sort(batch.positions.max(1)), ends - 1)


def test_parity_measures_the_gap():
  record = collect(compose.ready(GRPO))
  assert rollout.parity(record)['parity/max'] < 1e-6
  moved = dataclasses.replace(
      record, rows=dataclasses.replace(record.rows, logp=record.rows.logp - 0.25))
  np.testing.assert_allclose(rollout.parity(moved)['parity/mean'], 0.25, rtol=1e-5)


def test_a_source_of_averages_is_named_by_its_rate():
  assert label(Score(Source('average', 0.1), LOGP)) != label(Score(Source('average', 0.2), LOGP))
  assert label(SAMPLER) != label(REFERENCE)
