"""The model's passes for a run: training forward, scoring without gradient, sampling.

N rows, T positions. Sampler and trainer share arrays and code, so there is no weight to copy and
nothing to keep in step.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from launch import mesh as mesh_lib
from nn import model, mtp, score
from nn.config import ModelConfig, without_drops
from nn.types import Batch, Output, Want
from rl import sample
from rl.types import Rows

BUCKET = 64        # prompts of other contexts are padded to a multiple of this: few lengths compile


def make_forward(cfg: ModelConfig, replay: bool = False) -> Callable:
  """What a loss and a scoring pass are made of.

  (params, batch, wants) -> ({Want: [n, T, ...] float32}, Output).

  Args:
    replay: take the experts of batch.routes again; gates are today's, and routers learn by them.
  """

  def forward(params: Any, batch: Batch, wants: tuple[Want, ...]) -> tuple[dict, Output]:
    routes = batch.routes if replay else None
    output = model.forward(params, cfg, batch.tokens, batch.positions, batch.segments, routes,
                           mtp.wanted(wants, cfg))
    return score.score(params, cfg, output, batch, wants), output

  return forward


def make_decoder(cfg: ModelConfig, record: bool = False) -> sample.Decoder:
  """The model as the sampler sees it, for parameters that went through `nn.model.prepare`.

  No row is dropped, whatever cfg.moe.buffer.

  Args:
    record: its extras are the routes, {layer index: [..., top_k]}, in as few bits as hold them.
  """
  cfg = without_drops(cfg)
  dtype = np.min_scalar_type(-cfg.moe.experts)          # signed, because of -1

  def extras(routes):
    return jax.tree.map(lambda x: x.astype(dtype), routes) if record else None

  def prefill(params, tokens, start, length):
    hidden, cache, routes = model.prefill(params, cfg, tokens, start, length)
    return model.unembed(params, cfg, hidden), cache, extras(routes)

  def step(params, tokens, cache):
    hidden, cache, routes = model.step(params, cfg, tokens, cache)
    return model.unembed(params, cfg, hidden), cache, extras(routes)

  return sample.Decoder(prefill, step, model.repeat_cache)


def make_score(
    cfg: ModelConfig, mesh: jax.sharding.Mesh, rows: int, replay: bool = False) -> Callable:
  """A pass without gradient, in which no row is dropped.

  score(params, tokens [N, T], end [N], support, routes, data, wants, temperature) -> {Want: numpy
  [N, T, ...]}.

  Args:
    rows: of one pass; N is worked off in slices of this many, so that memory does not grow with
      the rollout batch.
    replay: take the experts of routes again, where there are any.
  """
  forward = make_forward(without_drops(cfg), replay)

  @functools.partial(jax.jit, static_argnames='wants')
  def one(params, batch, wants):
    return forward(params, batch, wants)[0]

  def scores(params, tokens, end, support, routes, data, wants, temperature):
    time = np.arange(tokens.shape[1], dtype=np.int32)
    inside = (time < end[:, None]).astype(np.int32)
    whole = Batch(
        tokens=tokens, positions=time * inside, segments=inside, masks={}, weights={}, coef={},
        data=data, temperature=np.float32(temperature), use=np.int32(0), support=support,
        routes=routes if replay else None)
    parts = []
    for first in range(0, len(tokens), rows):
      slice_of = lambda x: x if x.ndim == 0 else pad_rows(x[first:first + rows], rows)
      part = mesh_lib.put_global(jax.tree.map(slice_of, whole), mesh)
      parts.append(one(params, part, wants))
    parts = mesh_lib.gather(parts)
    return {w: jax.tree.map(lambda *x: np.concatenate(x)[:len(tokens)], *[p[w] for p in parts])
            for w in wants}

  return scores


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
  """[n, ...] -> [rows, ...], by repeating the last row."""
  return x if len(x) == rows else np.concatenate([x, np.repeat(x[-1:], rows - len(x), axis=0)])


def make_sample(cfg: ModelConfig, mesh: jax.sharding.Mesh, max_prompt: int,
                token_bytes: Any = None, record: bool = False) -> Callable:
  """sample(params, prompts, group, sampling, key) -> Rows of numpy, members of a group adjacent.

  Rows.group is the index of the prompt; info['stopped'] says which rows ended by themselves.

  Args:
    max_prompt: prompts are padded to this length (longer ones to a multiple of BUCKET), so that
      one program serves all.
    token_bytes: rl.sample.TokenBytes, needed where sampling.stop is not empty.
    record: fill Rows.routes, if the model has experts.
  """
  decoder = make_decoder(cfg, record)
  prepare = jax.jit(functools.partial(model.prepare, cfg=cfg))

  def rows(params: Any, prompts: list, group: int, sampling: sample.Sampling,
           key: jax.Array) -> Rows:
    longest = max(len(p) for p in prompts)
    width = max_prompt if longest <= max_prompt else -(-longest // BUCKET) * BUCKET
    if width + sampling.max_tokens > cfg.max_length:
      raise ValueError(f'prompts of {width} and responses of {sampling.max_tokens} tokens are '
                       f'longer than model.max_length {cfg.max_length}')
    count = round_up(len(prompts), mesh_lib.batch_ways(mesh))
    tokens = np.zeros((count, width), np.int32)
    start = np.full(count, width - 1, np.int32)    # rows that only fill up the mesh: one token
    for n, prompt in enumerate(prompts):
      start[n] = width - len(prompt)
      tokens[n, start[n]:] = prompt
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(count))
    tokens_on, start_on = mesh_lib.put_global((tokens, start), mesh)
    out = sample.sample(
        decoder, prepare(params), tokens_on, start_on, keys, group=group, sampling=sampling,
        token_bytes=token_bytes)
    out = mesh_lib.gather(out)
    prompt_extras = jax.tree.map(lambda x: x[:len(prompts)], out.prompt_extras)
    out = jax.tree.map(lambda x: x[:len(prompts) * group], out)
    begin = np.repeat(width - start[:len(prompts)], group).astype(np.int32)
    end = begin + out.length.astype(np.int32)
    where = np.arange(width + sampling.max_tokens)
    inside = (where >= begin[:, None]) & (where < end[:, None])
    # From prompts that end at one place to rows that begin at one place.
    join = lambda before, x: shift_left(
        np.concatenate([np.repeat(before, group, axis=0), x], axis=1), width - begin)
    behind = lambda x: join(np.zeros((len(prompts), width, *x.shape[2:]), x.dtype), x)
    left = join(tokens[:len(prompts)], out.tokens)
    read = (where < end[:, None] - 1)[..., None]
    routes = jax.tree.map(
        lambda before, x: np.where(read, join(before, x), -1), prompt_extras, out.extras)
    support = out.support
    if support is not None:
      support = np.where(inside[..., None], behind(support), -1)
    return Rows(
        tokens=np.where(where < end[:, None], left, 0), start=begin, end=end,
        logp=np.where(inside, behind(out.logp), 0),
        group=np.repeat(np.arange(len(prompts)), group),
        support=support, info={'stopped': out.stopped}, routes=routes or None)

  return rows


def round_up(n: int, to: int) -> int:
  return -(-n // to) * to


def few(length: int, most: int) -> int:
  """The next of few lengths, so that few programs compile: BUCKET times 1, 2, 3, 4, 6, 8, 12, ...;
  at most `most`.
  """
  if length <= BUCKET:
    return min(BUCKET, most)
  sizes = (BUCKET * n << k for k in range(32) for n in (2, 3))
  return min(next(size for size in sizes if size >= length), most)


def shift_left(x: np.ndarray, by: np.ndarray) -> np.ndarray:
  """x[n, by[n]:] at the front of every row, [N, T, ...] -> the same shape.

  What is shifted out comes back at the end.
  """
  index = (np.arange(x.shape[1]) + by[:, None]) % x.shape[1]
  return np.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
