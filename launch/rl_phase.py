"""The RL phase: prompts, samples, rewards, passes, stages, batches; and held-out accuracy.

N = prompts x group rows of a rollout batch, T = max_prompt + max_tokens positions.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from launch import engine as engine_lib
from launch import mesh as mesh_lib
from launch import rollout
from launch.loop import Feed, Told
from nn.types import LOGP
from rl import sample
from rl.rewards import pool
from rl.types import POLICY, SAMPLER, Method, Record, Rows, Term, View


@dataclasses.dataclass(frozen=True)
class Settings:
  """What an RL step is, read from the config once."""
  prompts: int             # per step
  group: int               # samples per prompt
  parts: int               # optimiser steps a rollout batch is cut into
  uses: int                # times it is used
  refills: int             # further draws when filters leave too few rows
  max_empty: int           # steps in a row without a single kept row before the run stops
  sampling: sample.Sampling
  weights: dict            # {reward component: its weight in the sum}; 1 where not given
  seed: int


def parity_term() -> Term:
  """Measures |trainer's - sampler's log-probability| in nats on the training forward; adds nothing to the loss."""

  def value(view: View):
    gap = jax.lax.stop_gradient(abs(view.given[LOGP] - view.given[SAMPLER]))
    return gap, {}

  return Term('parity', value, (LOGP, SAMPLER), coef=lambda record: 0.0)


def watched(method: Method) -> Method:
  """The method with the agreement of sampler and trainer among its metrics."""
  return dataclasses.replace(method, terms=(*method.terms, parity_term()))


def make_task(take: Callable, tokenizer: Any, grader: Any, settings: Settings) -> rollout.Task:
  """Prompts from a reader, responses from the engine, rewards from the grader.

  Args:
    take: (cursor, number) -> tuple of prompts, dicts with 'tokens', 'prompt' and the fields of the data row.
  """

  def ask(record: Record) -> Record:
    cursor = record.state['prompts']['cursor']
    state = record.state | {'prompts': {'cursor': cursor + settings.prompts}}
    return dataclasses.replace(record, state=state, prompts=take(cursor, settings.prompts))

  def answer(record: Record, engine: rollout.Engine, key: jax.Array) -> Record:
    clock = time.perf_counter()
    group = record.sampling.get('group', settings.group)
    rows = engine.sample(POLICY, [p['tokens'] for p in record.prompts], group, record.sampling, key)
    sampled = time.perf_counter()
    first = record.state['prompts']['cursor'] - settings.prompts
    rows = dataclasses.replace(rows, group=first + rows.group, info=rows.info | {'prompt': rows.group})
    reward, report = grade(grader, tokenizer, record.prompts, rows)
    reward = pool.weigh(reward, settings.weights)
    time_axis = np.arange(rows.tokens.shape[1])
    train = (time_axis >= rows.start[:, None]) & (time_axis < rows.end[:, None])
    notes = record.notes | report | {
        'time/sample': sampled - clock, 'time/grade': time.perf_counter() - sampled}
    return dataclasses.replace(
        record, rows=rows, reward=reward, masks={'train': train.astype(np.float32)}, notes=notes)

  return rollout.Task(ask, answer)


def response_text(tokenizer: Any, rows: Any, n: int) -> str:
  """The sampled text of row n, without the end-of-text token."""
  ids = [i for i in rows.tokens[n, rows.start[n]:rows.end[n]].tolist() if i != tokenizer.eos_id]
  return tokenizer.decode(ids)


def grade(grader: Any, tokenizer: Any, prompts: tuple, rows: Any) -> tuple[dict, dict]:
  """Rewards of all rows, each graded on the process it belongs to: ({name: [N]}, {'verifier_errors', 'verifier_timeouts', 'first_error'})."""
  mine = range(jax.process_index(), len(rows.start), jax.process_count())
  items = [(prompts[rows.info['prompt'][n]]['prompt'], response_text(tokenizer, rows, n),
            prompts[rows.info['prompt'][n]]) for n in mine]
  reward, report = grader.grade(items)
  everywhere = {}
  for name, values in reward.items():
    spread = np.zeros(len(rows.start))
    spread[list(mine)] = values
    everywhere[name] = spread
  counts = {f'verifier_{k}': float(report[k]) for k in ('errors', 'timeouts')}
  counts = mesh_lib.sum_over_processes(counts)
  return mesh_lib.sum_over_processes(everywhere), counts | {'first_error': report['first_error']}


def make_feed(method: Method, task: rollout.Task, make_engine: Callable, settings: Settings, place: Callable,
              decode: Callable, show: Callable, reads: Callable) -> Feed:
  """Rollouts as a source of batches.

  Args:
    make_engine: params -> rollout.Engine.
    place: Batch of numpy -> Batch on the devices.
    decode: (rows, n) -> text of the response.
    show: step -> bool: are samples of this step to be kept.
    reads: step -> key of the step.
  """
  num_rows = settings.prompts * settings.group
  empty = [0]

  def collect(params, memory, step):
    clock = time.perf_counter()
    sampling = dataclasses.asdict(settings.sampling) | {'group': settings.group}
    record = Record(step, memory, sampling)
    record = rollout.collect(
        method, make_engine(params), task, record, num_rows, reads(step), settings.refills,
        once=settings.parts * settings.uses == 1)
    empty[0] = 0 if len(record.rows.start) else empty[0] + 1
    if empty[0] >= settings.max_empty:
      raise ValueError(
          f'every sample was filtered away in {empty[0]} steps running (after {settings.refills} refills each): no prompt '
          'has both good and bad answers. Look at samples.jsonl; easier prompts, a shaped reward or no filter may help')
    return dataclasses.replace(record, notes=record.notes | {'time/collect': time.perf_counter() - clock})

  def batches(record):
    if len(record.rows.start):
      for batch in rollout.minibatches(method, record, settings.parts, settings.uses, settings.seed):
        yield place(batch)

  def finish(record):
    return rollout.run(method, record, None, reads(record.step), 'after').state

  def describe(record):
    rows, num = record.rows, len(record.rows.start)
    if not num:
      return Told(numbers(record.notes), 0, warning='every sample was filtered away: no update')
    real = record.masks['train'].any(1)
    length = (rows.end - rows.start)[real]
    logp = (rows.logp * record.masks['train']).sum() / max(record.masks['train'].sum(), 1)
    total = np.nansum(np.stack(list(record.reward.values())), 0)
    metrics = {
        'reward': total[real].mean(), 'response_length': length.mean(), 'truncated': 1 - rows.info['stopped'][real].mean(),
        'entropy': -logp, 'advantage_abs': np.abs(record.advantage[real]).mean() if record.advantage is not None else 0.0}
    metrics |= {f'reward/{k}': np.nanmean(v[real]) for k, v in record.reward.items() if np.isfinite(v[real]).any()}
    metrics = numbers(metrics | record.notes | rollout.parity(record))
    tokens, missing = int(rows.end[real].sum()), record.notes['rows_missing']
    warnings = [record.notes['first_error']] * bool(record.notes['first_error'])
    warnings += [f'{missing} of {num_rows} rows are missing after {settings.refills} refills'] * bool(missing)
    if not show(record.step + 1):
      return Told(metrics, tokens, warning='; '.join(warnings))
    order = np.argsort(total + np.where(real, 0, np.inf), kind='stable')[:int(real.sum())]
    picked = dict.fromkeys([*order[:4].tolist(), *order[-4:].tolist()])
    samples = [{'prompt': decode(dataclasses.replace(rows, start=0 * rows.start, end=rows.start), n),
                'response': decode(rows, n), 'reward': float(total[n]), 'group': int(rows.group[n]),
                'stopped': bool(rows.info['stopped'][n])} for n in picked]
    return Told(metrics, tokens, samples, '; '.join(warnings))

  return Feed(collect, batches, finish, describe)


def numbers(notes: dict) -> dict[str, float]:
  return {k: float(v) for k, v in notes.items() if not isinstance(v, str)}


def first_rows(rows: Rows, n: int) -> Rows:
  """The first n rows as drawn for evaluation, ready to be graded."""
  cut = lambda name: getattr(rows, name)[:n]
  return Rows(cut('tokens'), cut('start'), cut('end'), cut('logp'), cut('group'),
              info={'prompt': cut('group'), 'stopped': rows.info['stopped'][:n]})


def make_evaluate(draw: Callable, grader: Any, tokenizer: Any, problems: tuple, rows_at_once: int, greedy: sample.Sampling,
                  random: sample.Sampling | None, tries: int, reward: str, key: jax.Array) -> Callable:
  """Held-out accuracy, greedy and as pass@k; its own keys, so that training does not notice.

  Args:
    draw: launch.engine.make_sample's.
    problems: prompts as `data.prompts` gives them.
    rows_at_once: rows of one sampling call.
    random, tries: sampling and k of pass@k; None for none.
    reward: the component that counts; an answer is right where it is at least 1.
  """

  def solved(params, group, sampling, key):
    right, length, stop = [], [], []
    at_once = max(1, rows_at_once // group)
    for first in range(0, len(problems), at_once):
      some = problems[first:first + at_once]
      padded = [p['tokens'] for p in (*some, *[some[-1]] * (at_once - len(some)))]
      rows = draw(params, padded, group, sampling, jax.random.fold_in(key, first))
      rows = first_rows(rows, len(some) * group)
      values, _ = grade(grader, tokenizer, some, rows)
      right.append((values[reward] >= 1).reshape(-1, group))
      length.append(rows.end - rows.start)
      stop.append(rows.info['stopped'])
    return np.concatenate(right), np.concatenate(length), np.concatenate(stop)

  def evaluate(params, step):
    del step
    right, length, stopped = solved(params, 1, greedy, key)
    metrics = {'eval/accuracy': right.mean(), 'eval/problems': len(right), 'eval/response_length': length.mean(),
               'eval/truncated': 1 - stopped.mean()}
    if random is not None and tries > 1:
      right, _, _ = solved(params, tries, random, jax.random.fold_in(key, 1 << 20))
      metrics |= {f'eval/pass@{tries}': right.any(1).mean(), f'eval/mean@{tries}': right.mean()}
    return {k: float(v) for k, v in metrics.items()}

  return evaluate
