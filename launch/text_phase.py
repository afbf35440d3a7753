"""Pretraining and SFT: batches from a reader, and loss and accuracy on held-out rows.

B rows of a step, T positions.
"""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data import stream
from launch import mesh as mesh_lib
from launch.loop import Feed, Told
from nn.types import LOGP, Batch, draft, mtp, topk
from rl import pieces
from rl.compose import compose, ready
from rl.methods import mtp as heads
from rl.types import Method, Record

FAULTS = ('bad', 'long', 'truncated')    # what rows are left out or cut for, see data/sft.py


def make_method(where: str, m: Any, depth: int, first: int) -> Method:
  """Maximum likelihood of every token, and of what the heads say of those further ahead.

  Args:
    where: the block of the config, for messages.
    m: it, see configs/base.py; reads only what its choices use.
    depth: of the model's heads.
    first: step with which the phase begins.

  Raises:
    ValueError: names what does not fit.
  """
  if not m.coef:
    return ready(pieces.sft())
  switch, now = m.switch, m.coef
  later = m.later if switch else now
  if min(now, later, switch) < 0:
    raise ValueError(f'{where}: coef {now}, later {later} and switch {switch} must be at least 0')
  coef = lambda record: now if record.step < first + switch else later
  try:
    return heads.measured(ready(compose(pieces.sft(), heads.mtp_ce(depth, coef, m.detach))))
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from None


def make_batch(fields: dict, method: Method, step: int = 0) -> tuple[Batch, int]:
  """The rows of a reader as this process's part of a Batch, and the tokens of all processes.

  Weights are formed over the rows of every process: denominators belong to one optimiser step.

  Args:
    step: what coefficients with a schedule are of.
  """
  mask = mesh_lib.rows_of_all_processes(fields['mask'].astype(np.float32))
  own = lambda weight: mesh_lib.rows_of_this_process(weight).astype(np.float32)
  batch = Batch(
      tokens=fields['tokens'], positions=fields['positions'], segments=fields['segments'],
      masks={'train': fields['mask'].astype(np.float32)},
      weights={t.name: own(t.aggregate(mask)) for t in method.terms},
      coef={t.name: np.float32(t.coef(Record(step, {})) if callable(t.coef) else t.coef)
            for t in method.terms},
      data={}, temperature=np.float32(1), use=np.int32(0))
  return batch, int(mask.sum())


def make_feed(reader: Any, method: Method, mesh: jax.sharding.Mesh) -> Feed:
  """Rows of a reader as a source of batches; the reader's place is what must be remembered."""

  def collect(params, memory, step):
    del params
    batch, tokens = make_batch(reader.next(), method, step)
    before, now = memory['reader'], reader.state()
    return mesh_lib.put(batch, mesh), {'reader': now}, tokens, new_faults(before, now)

  def describe(work):
    return Told({f'rows_{name}': float(n) for name, n in work[3].items() if n}, work[2])

  return Feed(
      collect=collect, batches=lambda work: iter(work[:1]), finish=lambda work: work[1],
      describe=describe)


def new_faults(before: dict, now: dict) -> dict[str, float]:
  """Rows left out or cut between two states of a reader, on all processes, by fault.

  Args:
    before: may have sub-streams of other processes too.
  """
  found = dict.fromkeys(FAULTS, 0)
  for name, state in now.items():
    for fault, (count, _) in stream.faults(state).items():
      found[fault] += count - stream.faults(before[name]).get(fault, (0, ''))[0]
  return mesh_lib.sum_over_processes(found)


def make_evaluate(
    forward: Callable, parts: Mapping[str, Callable], mesh: jax.sharding.Mesh, depth: int = 0,
) -> Callable:
  """One pass of the held-out rows: what is below of all rows, and of each part of several.

  eval/loss: nats per predicted token. eval/token_accuracy: share of them that were the likeliest
  token. eval/mtp1/loss: the same of the first head of multi-token prediction, over tokens it has
  enough before; eval/mtp1/right and agrees: shares of them where its draft is the token, and is
  what the model finds likeliest.

  Args:
    forward: launch.engine.make_forward's.
    parts: {name: open}; open(Counter of faults) -> iterable of fields of this process; every
      process gets equally many.
    depth: heads of multi-token prediction.
  """
  best, ahead = topk(1), range(1, depth + 1)

  @jax.jit
  def sums(params, batch):
    wants = (LOGP, best, *map(mtp, ahead), *map(draft, ahead))
    scores, _ = forward(params, batch, wants)
    mask = batch.masks['train'] > 0
    right = scores[best][0][..., 0] == batch.tokens
    total = lambda x: jnp.sum(jnp.where(mask, x, 0))
    return [total(-scores[LOGP]), total(right), total(1), *(
        total(x) for k in ahead for x in (-scores[mtp(k)], *scores[draft(k)]))]

  def evaluate(params, step):
    del step
    found, faults = {}, collections.Counter()
    for name, open_rows in parts.items():
      batches = (mesh_lib.put(make_batch(fields, Method())[0], mesh)
                 for fields in open_rows(faults))
      found[name] = [sums(params, batch) for batch in batches]
    found = {name: np.asarray(x, np.float64).reshape(-1, 3 + 4 * depth).sum(0)
             for name, x in jax.device_get(found).items()}
    whole = sum(found.values())
    if not whole[2]:
      raise ValueError('the held-out rows have no token to predict')
    out = {}
    for prefix, (loss, right, tokens, *more) in {
        'eval': whole, **{f'eval/{name}': x for name, x in found.items()}}.items():
      if tokens and (prefix == 'eval' or len(found) > 1):
        out |= {f'{prefix}/loss': loss / tokens, f'{prefix}/token_accuracy': right / tokens}
        for k, (loss, known, right, agrees) in zip(ahead, np.reshape(more, (-1, 4))):
          out |= {f'{prefix}/mtp{k}/{name}': x / max(known, 1) for name, x in (
              ('loss', loss), ('right', right), ('agrees', agrees))}
    # Every process reads all rows, and has counted all of their faults.
    left_out = {f'eval/rows_{name}': float(n) for name, n in faults.items()}
    return {name: float(x) for name, x in out.items()} | {
        'eval/tokens': float(whole[2]), **left_out}

  return evaluate
