"""The RL phase: prompts, samples, rewards, passes, stages, batches; and held-out accuracy.

N = prompts x group rows of a rollout batch, T = max_prompt + max_tokens positions.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch import mesh as mesh_lib
from launch import rollout
from launch.loop import Feed, Told
from nn.types import LOGP, PULL
from rl import losses, sample
from rl.methods import mtp
from rl.rewards import pool
from rl.types import POLICY, SAMPLER, Method, Record, Rows, Score, Term, View

SHOWN = 4                  # of the best and of the worst samples of a step


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
  """Measures |trainer's - sampler's log-probability| in nats on the training forward.

  It adds nothing to the loss.
  """
  def value(view: View):
    gap = jax.lax.stop_gradient(abs(view.given[LOGP] - view.given[SAMPLER]))
    return gap, {}

  return Term('parity', value, (LOGP, SAMPLER), coef=lambda record: 0.0)


def shift_term(policy: Term) -> Term:
  """Measures how far the policy has moved on the rows it was sampled for; adds nothing to the loss.

  Under the policy term's weights: its own value is their sum W, chi2 the mean of ratio^2 - 1, an
  estimate of Pearson's chi-square, and pull that of advantage^2 |gradient of logp in the head|^2.
  The gradient G of the head obeys |G|^2 <= W^2 (1 + chi2) pull (Cauchy and Schwarz, our
  derivation), if the policy term is the whole loss and its weights are not multiplied.
  """
  old = next(n for n in policy.needs if isinstance(n, Score))

  def value(view: View):
    logp, pull = (jax.lax.stop_gradient(view.given[want]) for want in (LOGP, PULL))
    ratio = jnp.exp(losses.RATIOS['token'](logp, view.given[old], view.mask))
    return jnp.ones_like(view.mask), {
        'chi2': jnp.square(ratio) - 1, 'pull': jnp.square(view.batch.advantage) * pull}

  return Term(
      'shift', value, (LOGP, old, PULL), policy.aggregate, policy.mask, coef=lambda record: 0.0)


def watched(method: Method, shift: bool = False) -> Method:
  """The method with the agreement of sampler and trainer among its metrics, and what heads of
  multi-token prediction do, if it trains any.

  Args:
    shift: with `shift_term`, too.
  """
  terms = (*method.terms, parity_term())
  if shift:
    policy = next((t for t in method.terms if t.name == 'policy'), None)
    if policy is None:
      raise ValueError('rl.watch is set and no method has a policy term; what it measures is the '
                       "gradient of that term's advantages")
    terms += (shift_term(policy),)
  return mtp.measured(dataclasses.replace(method, terms=terms))


def make_task(take: Callable, tokenizer: Any, grader: Any, settings: Settings) -> rollout.Task:
  """Prompts from a reader, responses from the engine, rewards from the grader.

  Args:
    take: (cursor, number) -> tuple of prompts, dicts with 'tokens', 'prompt' and the fields of
      the data row.
  """

  def ask(record: Record) -> Record:
    cursor = record.state['prompts']['cursor']
    state = record.state | {'prompts': {'cursor': cursor + settings.prompts}}
    return dataclasses.replace(record, state=state, prompts=take(cursor, settings.prompts))

  def answer(record: Record, engine: rollout.Engine, key: jax.Array) -> Record:
    clock = time.perf_counter()
    group = record.sampling.get('group', settings.group)
    prompts = [p['tokens'] for p in record.prompts]
    rows = engine.sample(POLICY, prompts, group, record.sampling, key)
    sampled = time.perf_counter()
    first = record.state['prompts']['cursor'] - settings.prompts
    rows = dataclasses.replace(
        rows, group=first + rows.group, info=rows.info | {'prompt': rows.group})
    reward, report = grade(grader, tokenizer, record.prompts, rows)
    reward = pool.weigh(reward, settings.weights)
    where = np.arange(rows.tokens.shape[1])
    train = (where >= rows.start[:, None]) & (where < rows.end[:, None])
    notes = record.notes | report | {
        'time/sample': sampled - clock, 'time/grade': time.perf_counter() - sampled}
    return dataclasses.replace(
        record, rows=rows, reward=reward, masks={'train': train.astype(np.float32)}, notes=notes)

  return rollout.Task(ask, answer)


def prompt_text(tokenizer: Any, rows: Rows, n: int) -> str:
  return tokenizer.decode(rows.tokens[n, :rows.start[n]].tolist())


def response_text(tokenizer: Any, rows: Rows, n: int) -> str:
  """The sampled text of row n, without the end-of-text token."""
  return text_of(tokenizer, rows.tokens[n, rows.start[n]:rows.end[n]].tolist())


def text_of(tokenizer: Any, ids: list[int]) -> str:
  return tokenizer.decode([i for i in ids if i not in tokenizer.end_ids])


def grade(grader: Any, tokenizer: Any, prompts: tuple, rows: Rows) -> tuple[dict, dict]:
  """Rewards of all rows, each graded on the process it belongs to.

  Returns:
    {name: [N]}, and {'verifier_errors', 'verifier_timeouts': over all processes, 'first_error':
    of this one, '' without any}.
  """
  mine = range(jax.process_index(), len(rows.start), jax.process_count())
  own = [prompts[rows.info['prompt'][n]] for n in mine]
  reward, report = grader.grade(
      [(row['prompt'], response_text(tokenizer, rows, n), row) for n, row in zip(mine, own)])
  everywhere = {}
  for name, values in reward.items():
    everywhere[name] = np.zeros(len(rows.start))
    everywhere[name][list(mine)] = values
  counts = {f'verifier_{k}': float(report[k]) for k in ('errors', 'timeouts')}
  everywhere, counts = mesh_lib.sum_over_processes((everywhere, counts))
  return everywhere, counts | {'first_error': report['first_error']}


def make_feed(method: Method, task: rollout.Task, make_engine: Callable, settings: Settings,
              place: Callable, tokenizer: Any, show: Callable, key_of: Callable) -> Feed:
  """Rollouts as a source of batches.

  Args:
    make_engine: params -> rollout.Engine.
    place: Batch of numpy -> Batch on the devices.
    show: step -> bool: are samples of this step to be kept.
    key_of: step -> key of the step.
  """
  num_rows = settings.prompts * settings.group
  empty = [0]

  def collect(params, memory, step):
    clock = time.perf_counter()
    sampling = dataclasses.asdict(settings.sampling) | {'group': settings.group}
    record = rollout.collect(
        method, make_engine(params), task, Record(step, memory, sampling), num_rows, key_of(step),
        settings.refills, once=settings.parts * settings.uses == 1)
    empty[0] = 0 if len(record.rows.start) else empty[0] + 1
    if empty[0] >= settings.max_empty:
      raise ValueError(
          f'every sample was filtered away in {empty[0]} steps running (after {settings.refills} '
          'refills each): no prompt has both good and bad answers; easier prompts, a shaped reward '
          'or no filter may help')
    notes = record.notes | {'time/collect': time.perf_counter() - clock}
    return dataclasses.replace(record, notes=notes)

  def batches(record):
    if len(record.rows.start):
      for batch in rollout.minibatches(
          method, record, settings.parts, settings.uses, settings.seed):
        yield place(batch)

  def finish(record):
    return rollout.run(method, record, None, key_of(record.step), 'after').state

  def describe(record):
    warning = '; '.join(warnings(record, settings.refills))
    if not len(record.rows.start):
      return Told(numbers(record.notes), 0, warning=warning)
    samples = samples_of(record, tokenizer) if show(record.step + 1) else ()
    return Told(metrics_of(record), int(record.rows.end[real(record)].sum()), samples, warning)

  return Feed(collect, batches, finish, describe)


def real(record: Record) -> np.ndarray:
  """Which rows are samples, and not there to fill up the batch: [N] bool."""
  return record.masks['train'].any(axis=1)


def total(record: Record) -> np.ndarray:
  """Sum of every row's reward components: [N]."""
  return np.nansum(np.stack(list(record.reward.values())), axis=0)


def numbers(notes: dict) -> dict[str, float]:
  return {name: float(x) for name, x in notes.items() if not isinstance(x, str)}


def warnings(record: Record, refills: int) -> list[str]:
  """What a person should know about this step."""
  notes, found = record.notes, []
  if failed := notes['verifier_errors'] + notes['verifier_timeouts']:
    first = notes['first_error'] or 'the first was met by another process'
    found.append(f'{failed:.0f} rewards could not be computed and count 0: {first}')
  if not len(record.rows.start):
    found.append('every sample was filtered away: no update')
  elif missing := notes['rows_missing']:
    found.append(f'{missing} of {len(record.rows.start)} rows are missing after {refills} refills')
  return found


def metrics_of(record: Record) -> dict[str, float]:
  """What is known of a rollout batch on the host."""
  rows, some, train = record.rows, real(record), record.masks['train']
  reward = {name: r[some] for name, r in record.reward.items()}
  found = {
      'reward': total(record)[some].mean(),
      'response_length': (rows.end - rows.start)[some].mean(),
      'truncated': 1 - rows.info['stopped'][some].mean(),
      'entropy': -(rows.logp * train).sum() / max(train.sum(), 1)}
  if record.advantage is not None:
    found['advantage_abs'] = np.abs(record.advantage * train).sum() / max(train.sum(), 1)
  found |= {f'reward/{k}': np.nanmean(r) for k, r in reward.items() if np.isfinite(r).any()}
  return numbers(found | record.notes | rollout.parity(record))


def samples_of(record: Record, tokenizer: Any) -> list[dict]:
  """The worst and the best rows of a step, as people read them."""
  rows, reward = record.rows, total(record)
  some = np.flatnonzero(real(record))
  order = some[np.argsort(reward[some], kind='stable')].tolist()
  return [{'prompt': prompt_text(tokenizer, rows, n), 'response': response_text(tokenizer, rows, n),
           'reward': float(reward[n]), 'group': int(rows.group[n]),
           'stopped': bool(rows.info['stopped'][n])}
          for n in dict.fromkeys([*order[:SHOWN], *order[-SHOWN:]])]


def first_rows(rows: Rows, n: int) -> Rows:
  """The first n rows as drawn for evaluation, ready to be graded."""
  cut = lambda name: getattr(rows, name)[:n]
  return Rows(cut('tokens'), cut('start'), cut('end'), cut('logp'), cut('group'),
              info={'prompt': cut('group'), 'stopped': rows.info['stopped'][:n]})


def make_evaluate(draw: Callable, grader: Any, tokenizer: Any, problems: tuple, rows_at_once: int,
                  greedy: sample.Sampling, random: sample.Sampling | None, tries: int, reward: str,
                  key: jax.Array) -> Callable:
  """Held-out accuracy, greedy and as pass@k; its own keys, so that training does not notice.

  Args:
    draw: launch.engine.make_sample's.
    problems: prompts as `data.prompts` gives them.
    rows_at_once: rows of one sampling call.
    random, tries: sampling and k of pass@k; None for none.
    reward: the component that counts; an answer is right where it is at least 1.
  """

  def solved(params, group, sampling, key):
    right, length, stopped, failed = [], [], [], 0.0
    at_once = max(1, rows_at_once // group)
    for first in range(0, len(problems), at_once):
      some = problems[first:first + at_once]
      padded = [p['tokens'] for p in (*some, *[some[-1]] * (at_once - len(some)))]
      rows = draw(params, padded, group, sampling, jax.random.fold_in(key, first))
      rows = first_rows(rows, len(some) * group)
      values, report = grade(grader, tokenizer, some, rows)
      right.append((values[reward] >= 1).reshape(-1, group))
      length.append(rows.end - rows.start)
      stopped.append(rows.info['stopped'])
      failed += report['verifier_errors'] + report['verifier_timeouts']
    join = np.concatenate
    return join(right), join(length).mean(), 1 - join(stopped).mean(), failed

  def evaluate(params, step):
    del step
    right, length, truncated, failed = solved(params, 1, greedy, key)
    metrics = {'eval/accuracy': right.mean(), 'eval/problems': len(right),
               'eval/response_length': length, 'eval/truncated': truncated}
    if random is not None:
      right, _, _, more = solved(params, tries, random, jax.random.fold_in(key, 1 << 20))
      metrics |= {f'eval/pass@{tries}': right.any(1).mean(), f'eval/mean@{tries}': right.mean()}
      failed += more
    if failed:
      metrics['eval/verifier_errors'] = failed
    return {name: float(x) for name, x in metrics.items()}

  return evaluate
