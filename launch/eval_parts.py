"""What an evaluation is made of: its tasks and rows, and the model as evals sees it."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from data import fields, files, sources
from evals import rows as rows_lib
from launch import progress, scoring, talk
from rl import names, sample

Plan = dict[str, tuple[tuple[str, ...], dict[str, str]]]


def read_plan(options: argparse.Namespace) -> Plan:
  """The options of launch/evaluate.py as {task: (patterns of its files, its fields' names)}."""
  if len(options.task) != len(options.files):
    raise ValueError(f'{len(options.task)} --task and {len(options.files)} --files; every task '
                     'wants files of its own')
  if options.num < 1 or options.rows < options.num or options.limit < 0:
    raise ValueError(f'num is {options.num}, rows {options.rows}, limit {options.limit}; wanted '
                     'num at least 1, rows at least num, limit at least 0')
  if options.num > 1 and options.temperature == 0:
    raise ValueError(f'num is {options.num} at temperature 0, where all responses are the same')
  given = {}
  for part in filter(None, options.fields.split(',')):
    what, equals, field = (text.strip() for text in part.partition('='))
    if not equals or not field:
      raise ValueError(f'fields {options.fields!r}: wanted what=field, with commas between several')
    given[what] = field
  plan = {}
  for name, patterns in zip(options.task, options.files):
    _, usual = names.choose(rows_lib.KINDS, name, 'task')
    if name in plan:
      raise ValueError(f'task {name!r} is given twice; give it all its files at once')
    plan[name] = (tuple(patterns), {what: given.get(what, field) for what, field in usual.items()})
  if strange := sorted(given.keys() - {what for _, named in plan.values() for what in named}):
    raise ValueError(f'fields {strange} mean nothing to {options.task}')
  return plan


def make_codec(speaker: talk.Speaker, sampling: sample.Sampling,
               options: argparse.Namespace) -> rows_lib.Codec:
  """How this model is asked, what it can read, and what its responses say."""
  tokenizer, most = speaker.tokenizer, speaker.cfg.max_length
  before = [{'role': 'system', 'content': options.system}] if options.system else []
  ask = lambda text: talk.chat_prompt(speaker, [*before, {'role': 'user', 'content': text}])
  return rows_lib.Codec(
      prompt=ask if options.chat else lambda text: talk.prompt(speaker, text),
      after=tokenizer.encode_after,
      whole=lambda text: fields.begin(tokenizer) + tokenizer.encode(text),
      decode=lambda ids: talk.response_text(tokenizer, ids, sampling.stop),
      room=most - sampling.max_tokens, max_length=most)


def read_examples(task: str, patterns: tuple[str, ...], named: dict[str, str],
                  codec: rows_lib.Codec, limit: int, cache: str) -> list[rows_lib.Example]:
  """What the rows of a task become, each with the place of its row.

  Args:
    limit: rows that are read, the first; 0: all.
    cache: a folder for unpacked copies and line indexes.
  """
  make, _ = rows_lib.KINDS[task]
  source = texts(patterns, named['text'], cache) if 'text' in named else sources.load(
      patterns, cache)
  return [dataclasses.replace(example, info={'row': source.where(i), **example.info})
          for i in range(min(limit or len(source), len(source)))
          for example in fields.at(source, i, lambda row: make(row, codec, named))]


def texts(patterns: tuple[str, ...], field: str, cache: str) -> sources.Rows:
  """Rows of .jsonl files, and of every other file its text as one row."""
  def rows(path: Path) -> sources.Rows:
    if files.kind(path) in sources.LINES:
      return sources.load(str(path), cache)
    try:
      return sources.Listed([{field: files.plain(path, cache).read_text('utf-8')}], str(path))
    except UnicodeDecodeError as e:
      raise ValueError(f'{path} is not text: {e}') from e
  return sources.Joined([rows(path) for path in files.expand(patterns)])


def make_answer(speaker: talk.Speaker, sampling: sample.Sampling,
                options: argparse.Namespace) -> Callable:
  """answer(prompts) -> for each `num` responses, ids; empty ones for a prompt without ids."""
  num, at_once, key = options.num, options.rows // options.num, jax.random.key(options.seed)
  reply = talk.make_answer(speaker, num, sampling)

  def answer(prompts: list[list[int]]) -> list[list[list[int]]]:
    order = sorted((i for i, ids in enumerate(prompts) if ids), key=lambda i: len(prompts[i]))
    found, cut = [[[]] * num for _ in prompts], 0
    line = progress.Progress('answer', len(order), 'prompts')
    for first in range(0, len(order), at_once):
      some = order[first:first + at_once]
      asked = [prompts[i] for i in (*some, *[some[-1]] * (at_once - len(some)))]
      for i, replies in zip(some, reply(asked, jax.random.fold_in(key, first))):
        found[i] = [r.ids for r in replies]
        cut += sum(not r.ended for r in replies)
      line.add(len(some))
    if cut:
      print(f'{cut} of {num * len(order)} responses were cut off after {sampling.max_tokens} '
            'tokens, see --max_tokens', file=sys.stderr)
    return found

  return answer


def make_score(speaker: talk.Speaker, rows: int) -> Callable:
  """score(pairs of ids) -> the log-probability of each second one after the first, in nats."""
  logp = scoring.make_logp(speaker, rows)

  def score(pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    line = progress.Progress('score', len(pairs), 'texts')
    values = logp([given + targets for given, targets in pairs], line.add)
    return [float(np.sum(v[len(given):], dtype=np.float64)) for (given, _), v in zip(pairs, values)]

  return score
