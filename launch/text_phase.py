"""Pretraining and SFT: batches from a reader, and the loss on held-out rows. B rows of a step, T positions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch import mesh as mesh_lib
from launch.loop import Feed, Told
from nn.types import LOGP, Batch
from rl.types import Method


def make_batch(fields: dict, method: Method) -> tuple[Batch, int]:
  """The rows of a reader as this process's part of a Batch, and the tokens of all processes.

  Weights are formed over the rows of every process: denominators belong to one optimiser step.
  """
  mask = mesh_lib.rows_of_all_processes(fields['mask'].astype(np.float32))
  weights = {t.name: mesh_lib.rows_of_this_process(t.aggregate(mask)).astype(np.float32) for t in method.terms}
  batch = Batch(
      tokens=fields['tokens'], positions=fields['positions'], segments=fields['segments'],
      masks={'train': fields['mask'].astype(np.float32)}, weights=weights,
      coef={t.name: np.float32(t.coef) for t in method.terms}, data={}, temperature=np.float32(1), use=np.int32(0))
  return batch, int(mask.sum())


def make_feed(reader: Any, method: Method, mesh: jax.sharding.Mesh) -> Feed:
  """Rows of a reader as a source of batches; the reader's place is what must be remembered."""

  def collect(params, memory, step):
    del params, memory, step
    batch, tokens = make_batch(reader.next(), method)
    return mesh_lib.put(batch, mesh), {'reader': reader.state()}, tokens

  return Feed(
      collect=collect,
      batches=lambda work: iter(work[:1]),
      finish=lambda work: work[1],
      describe=lambda work: Told({}, work[2]))


def make_evaluate(forward: Callable, open_reader: Callable, mesh: jax.sharding.Mesh) -> Callable:
  """Loss in nats per predicted token over one pass of the held-out rows.

  Args:
    forward: launch.engine.make_forward's.
    open_reader: () -> iterable of fields of this process; every process gets equally many.
  """

  @jax.jit
  def sums(params, batch):
    scores, _ = forward(params, batch, (LOGP,))
    mask = batch.masks['train']
    return -jnp.sum(jnp.where(mask > 0, scores[LOGP], 0)), jnp.sum(mask)

  def evaluate(params, step):
    del step
    parts = []
    for fields in open_reader():
      batch, _ = make_batch(fields, Method())
      parts.append(sums(params, mesh_lib.put(batch, mesh)))
    loss, tokens = np.sum(np.asarray(jax.device_get(parts), np.float64), axis=0)
    if not tokens:
      raise ValueError('the held-out rows have no token to predict')
    return {'eval/loss': float(loss / tokens), 'eval/tokens': float(tokens)}

  return evaluate
