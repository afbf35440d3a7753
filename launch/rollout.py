"""Executes a Method on the host: the place that knows both the model's passes and rl's requests.

N rows of a rollout batch, n of an optimiser step, T positions (prompt and response), L of a pass
with another context.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from nn.types import Batch, Want
from rl import compose
from rl.types import OLD, POLICY, SAMPLER, Generate, Method, Record, Rows, Samples, Score, label

# Passes over other contexts are as long as a multiple of this, so that few lengths are compiled.
BUCKET = 64


class Engine(NamedTuple):
  """What a rollout may do with today's weights. Arrays are numpy, the same on every process."""
  # (source, prompts: list of ids, group, sampling: dict, key) -> Rows; group is the prompt's index
  sample: Callable
  # str -> list of ids
  encode: Callable
  # (source, tokens [N,L], end [N], support, routes, data, wants, temperature) -> {Want: [N,L,...]}
  score: Callable


def encode(engine: Engine, texts: tuple) -> list[list[int]]:
  """Per row the ids of its parts: strings are encoded, ids pass through."""
  return [[i for part in row for i in (engine.encode(part) if isinstance(part, str) else part)]
          for row in texts]


def pack(prefix: list, target: list) -> tuple[np.ndarray, np.ndarray]:
  """Prefix then target in every row: tokens [N, L] int32, where the target begins [N]."""
  length = max(len(p) + len(t) for p, t in zip(prefix, target))
  tokens = np.zeros((len(prefix), -(-length // BUCKET) * BUCKET), np.int32)
  for n, (p, t) in enumerate(zip(prefix, target)):
    tokens[n, :len(p) + len(t)] = [*p, *t]
  return tokens, np.array([len(p) for p in prefix])


def place(
    x: np.ndarray, source: np.ndarray, target: np.ndarray, count: np.ndarray, length: int,
) -> np.ndarray:
  """Moves x[n, source[n]:][:count[n]] to position target[n] of a zero array [N, length, ...]."""
  out = np.zeros((len(x), length, *x.shape[2:]), x.dtype)
  for n in range(len(x)):
    out[n, target[n]:target[n] + count[n]] = x[n, source[n]:source[n] + count[n]]
  return out


def resolve(
    needs: tuple, record: Record, engine: Engine, everything: tuple, key: jax.Array,
) -> Record:
  """Runs what is missing from record.results; scores of one source and context are one pass.

  Args:
    everything: all requests of the method, `compose.requests`.
    key: of this step.
  """
  for request in needs:
    if isinstance(request, Want) or request in record.results:
      continue
    context = request.context
    record = resolve(
        request.needs + (context.needs if context else ()), record, engine, everything, key)
    if isinstance(request, Generate):
      texts = context.build(record)
      prefix = encode(engine, texts.prefix)
      sampling = {'max_tokens': request.max_tokens, 'temperature': request.temperature}
      rows = engine.sample(
          request.source, prefix, 1, sampling,
          jax.random.fold_in(key, zlib.crc32(label(request).encode())))
      cut = lambda x: tuple(
          x[n, s:e].tolist() for n, (s, e) in enumerate(zip(rows.start, rows.end)))
      new = {request: Samples(tuple(map(tuple, prefix)), cut(rows.tokens), cut(rows.logp))}
    elif request == SAMPLER:
      new = {request: record.rows.logp}
    else:
      same = [r for r in everything
              if isinstance(r, Score) and (r.source, r.context) == (request.source, context)
              and r not in record.results and all(n in record.results for n in r.needs)]
      new = score(same, record, engine)
    record = dataclasses.replace(record, results=record.results | new)
  return record


def score(same: list[Score], record: Record, engine: Engine) -> dict:
  """One pass without gradient for all requests of a source and context; 0 outside scored tokens.

  The sampler's routes are the policy's for the rows as they are: other weights choose for
  themselves, and so do other contexts.
  """
  rows, context, source = record.rows, same[0].context, same[0].source
  wants = tuple(sorted({r.want for r in same}))
  temperature = record.sampling.get('temperature', 1.0) or 1.0
  total = rows.tokens.shape[1]
  data = {label(r): v for r, v in record.results.items()
          if isinstance(r, Score) and isinstance(v, tuple)
          and any(w.ids == label(r) for w in wants)}
  if context is None:
    routes = rows.routes if source == POLICY else None
    out = engine.score(
        source, rows.tokens, rows.end, rows.support, routes, data, wants, temperature)
    count = rows.end - rows.start
    inside = lambda x: place(np.asarray(x), rows.start, rows.start, count, total)
    return {r: jax.tree.map(inside, out[r.want]) for r in same}
  texts = context.build(record)
  prefix = encode(engine, texts.prefix)
  if texts.target is None:
    target = [row[s:e].tolist() for row, s, e in zip(rows.tokens, rows.start, rows.end)]
    tokens, start = pack(prefix, target)
    count = rows.end - rows.start
    move = lambda x: place(np.asarray(x), rows.start, start, count, tokens.shape[1])
    support = None if rows.support is None else np.where(
        move(np.ones_like(rows.tokens))[..., None] > 0, move(rows.support), -1)
    out = engine.score(
        source, tokens, start + count, support, None, jax.tree.map(move, data), wants, temperature)
    back = lambda x: place(np.asarray(x), start, rows.start, count, total)
  else:
    target = encode(engine, texts.target)
    tokens, start = pack(prefix, target)
    count = np.array([len(t) for t in target])
    out = engine.score(source, tokens, start + count, None, None, {}, wants, temperature)
    back = lambda x: place(np.asarray(x), start, 0 * start, count, int(count.max()))
  return {r: jax.tree.map(back, out[r.want]) for r in same}


def run(
    method: Method, record: Record, engine: Engine | None, key: jax.Array, *slots: str,
) -> Record:
  """Runs the stages of some slots, each after the passes it needs."""
  everything = compose.requests(method)
  for stage in method.stages:
    if stage.slot in slots:
      record = stage.run(resolve(stage.needs, record, engine, everything, key))
  return record


def take(record: Record, index: np.ndarray) -> Record:
  """The record with some of its rows, in the order of index.

  Results of passes are dropped: they are per row.
  """
  pick = lambda tree: jax.tree.map(lambda x: x[index], tree)
  rows = Rows(**{f.name: pick(getattr(record.rows, f.name)) for f in dataclasses.fields(Rows)})
  return dataclasses.replace(
      record, rows=rows, masks=pick(record.masks), reward=pick(record.reward), keep=None,
      results={})


def join(a: Record | None, b: Record) -> Record:
  """Rows of both, with the state and prompts of the later one.

  Counts in notes add up, the first text stays.
  """
  if a is None:
    return b
  both = lambda x, y: jax.tree.map(lambda u, v: np.concatenate([u, v]), x, y)
  rows = Rows(**{f.name: both(getattr(a.rows, f.name), getattr(b.rows, f.name))
                 for f in dataclasses.fields(Rows)})
  add = lambda x, y: x or y if isinstance(x, str) else x + y
  twice = a.notes.keys() & b.notes.keys()
  notes = a.notes | b.notes | {name: add(a.notes[name], b.notes[name]) for name in twice}
  return dataclasses.replace(
      b, rows=rows, masks=both(a.masks, b.masks), reward=both(a.reward, b.reward), notes=notes)


def whole_groups(group: np.ndarray, num_rows: int) -> np.ndarray:
  """Rows of the first groups, in order of appearance, that together have at most num_rows rows."""
  _, first, index, counts = np.unique(
      group, return_index=True, return_inverse=True, return_counts=True)
  kept, total = [], 0
  for g in np.argsort(first):
    if total + counts[g] <= num_rows:
      kept, total = [*kept, g], total + counts[g]
  return np.flatnonzero(np.isin(index, kept))


def fill(record: Record, num_rows: int) -> Record:
  """Missing rows become copies of the first with mask 0 and a group of their own.

  So the batch keeps its shape.
  """
  have = len(record.rows.start)
  missing = num_rows - have
  record = take(record, np.concatenate([np.arange(have), np.zeros(missing, int)]))
  real = np.arange(num_rows) < have
  group = np.where(real, record.rows.group, record.rows.group.max() + 1)
  masks = {k: m * real[:, None].astype(m.dtype) for k, m in record.masks.items()}
  reward = {k: np.where(real, r, np.nan) for k, r in record.reward.items()}
  return dataclasses.replace(
      record, rows=dataclasses.replace(record.rows, group=group), masks=masks, reward=reward)


class Task(NamedTuple):
  """Where prompts come from and what a response is worth."""
  ask: Callable      # record -> record with prompts, and the reader's place moved on in its state
  answer: Callable   # (record, engine, key) -> record with rows, masks and the task's own rewards


def collect(
    method: Method, engine: Engine, task: Task, record: Record, num_rows: int, key: jax.Array,
    refills: int, once: bool = False,
) -> Record:
  """One rollout batch: draws until enough rows are kept, then all that needs today's weights.

  Args:
    record: step, state and sampling of this step.
    num_rows: rows of the batch.
    key: of this step; attempt i draws with fold_in(key, i).
    once: the rows make one optimiser step and are used once. Then a term's OLD is the training
      forward itself, and no pass is spent on it.
    refills: draws after the first. Afterwards it goes on with what it has; notes say how many rows
      are missing.

  Returns:
    The record, with the results of every request of every stage and term. No rows at all if every
    one was filtered.
  """
  kept, filtered = None, 0
  for attempt in range(refills + 1):
    key_now = jax.random.fold_in(key, attempt)
    record = dataclasses.replace(
        record, rows=None, keep=None, results={}, reward={}, masks={}, notes={})
    record = run(method, task.ask(record), engine, key_now, 'prompts')
    record = task.answer(record, engine, key_now)
    record = run(method, record, engine, key_now, 'rows', 'reward', 'filter')
    if record.keep is not None:
      filtered += int((~record.keep).sum())
      record = take(record, np.flatnonzero(record.keep))
    kept = join(kept, record)
    if len(kept.rows.start) >= num_rows:
      break
  record = take(kept, whole_groups(kept.rows.group, num_rows))
  have = len(record.rows.start)
  notes = record.notes | {
      'draws': attempt + 1, 'rows_filtered': filtered, 'rows_missing': num_rows - have}
  record = dataclasses.replace(record, notes=notes)
  if have == 0:
    return record
  if have < num_rows:
    record = fill(record, num_rows)
  record = run(
      method, record, engine, key, 'estimate', 'add', 'multiply', 'clip', 'ratio', 'weight')
  everything = compose.requests(method)
  for term in method.terms:
    needs = tuple(n for n in term.needs if not (once and n == OLD))
    record = resolve(needs, record, engine, everything, key)
  return record


def parity(record: Record) -> dict[str, float]:
  """How far the trainer's log-probabilities of sampled tokens are from the sampler's, in nats."""
  if OLD not in record.results:
    return {}
  gap = np.abs(record.results[OLD] - record.rows.logp) * record.masks['train']
  return {'parity/max': float(gap.max()),
          'parity/mean': float(gap.sum() / max(record.masks['train'].sum(), 1))}


def minibatch(method: Method, record: Record, index: np.ndarray, use: int) -> Batch:
  """The rows of one optimiser step.

  Weights are formed here: denominators belong to one optimiser step.
  """
  rows = record.rows
  masks = {k: m[index].astype(np.float32) for k, m in record.masks.items()}
  weights = {}
  for term in method.terms:
    weight, extra = term.aggregate(masks[term.mask]), record.weight.get(term.name)
    if extra is not None:
      extra = extra[index]
      weight = weight * (extra[:, None] if extra.ndim < weight.ndim else extra)
    weights[term.name] = weight.astype(np.float32)
  coef = {t.name: np.float32(t.coef(record) if callable(t.coef) else t.coef) for t in method.terms}
  data = {label(r): jax.tree.map(lambda x: x[index], record.results[r])
          for t in method.terms for r in t.needs if r in record.results}
  time = np.arange(rows.tokens.shape[1], dtype=np.int32)
  inside = (time < rows.end[index][:, None]).astype(np.int32)
  return Batch(
      tokens=rows.tokens[index], positions=time * inside, segments=inside, masks=masks,
      weights=weights, coef=coef, data=data,
      temperature=np.float32(record.sampling.get('temperature', 1.0) or 1.0), use=np.int32(use),
      advantage=None if record.advantage is None else record.advantage[index],
      **jax.tree.map(lambda x: x[index], {'support': rows.support, 'routes': rows.routes}))


def minibatches(
    method: Method, record: Record, parts: int, uses: int, seed: int,
) -> Iterator[Batch]:
  """uses x parts optimiser steps. Halves are shuffled alike: row i + n/2 stays row i's partner."""
  half = len(record.rows.start) // 2
  for use in range(uses):
    order = np.random.default_rng([seed, record.step, use]).permutation(half)
    order = np.concatenate([order, order + half])
    for j in range(parts):
      yield minibatch(method, record, order[j::parts], use)
