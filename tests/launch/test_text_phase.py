"""Evaluation of text phases: loss and accuracy of all held-out tokens, and of each part alone."""

import jax.numpy as jnp
import numpy as np

from launch import mesh as mesh_lib
from launch import text_phase
from nn.types import LOGP, topk


def forward(params, batch, wants):
  """Token t has log-probability -t; token 5 is the likeliest everywhere."""
  del params
  assert wants == (LOGP, topk(1))
  likeliest = jnp.full((*batch.tokens.shape, 1), 5)
  return {LOGP: -batch.tokens.astype(jnp.float32),
          topk(1): (likeliest, jnp.zeros(likeliest.shape))}, None


def rows(*tokens):
  """One batch of one row; its first token is not predicted."""
  tokens = np.array([tokens], np.int32)
  mask = np.ones_like(tokens, np.float32)
  mask[:, 0] = 0
  plain = np.ones_like(tokens)
  return {'tokens': tokens, 'positions': plain, 'segments': plain, 'mask': mask}


def evaluate(parts):
  mesh = mesh_lib.make_mesh({'data': 1})
  opened = {name: lambda faults, found=found: (faults.update(['long']), found)[1]
            for name, found in parts.items()}
  return text_phase.make_evaluate(forward, opened, mesh)({}, 0)


def test_parts_are_told_apart_and_weighed_by_their_tokens():
  found = evaluate({'a': [rows(9, 5, 5, 2), rows(9, 1, 1, 1)], 'b': [rows(7, 5, 3)]})
  assert found == {
      'eval/loss': (15 + 8) / 8, 'eval/token_accuracy': 3 / 8,
      'eval/a/loss': 15 / 6, 'eval/a/token_accuracy': 2 / 6,
      'eval/b/loss': 4.0, 'eval/b/token_accuracy': 0.5, 'eval/tokens': 8.0, 'eval/rows_long': 2.0}


def test_a_single_part_is_all_there_is():
  assert evaluate({'rows': [rows(9, 5)]}) == {
      'eval/loss': 5.0, 'eval/token_accuracy': 1.0, 'eval/tokens': 1.0, 'eval/rows_long': 1.0}
