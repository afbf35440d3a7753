"""What an RL phase is made of, by its config: sampling, grader, evaluation, reference policy."""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from launch import checkpoint, rl_phase
from launch import config as config_lib
from nn import lora, model, param
from rl import compose, gate, rewards, sample
from rl.names import choose
from rl.rewards import pool
from rl.types import REFERENCE, Method, Score


def sampling_of(run: Any, c: Any) -> sample.Sampling:
  """How an RL phase samples; reads the cap on recorded ids only where some are cut off."""
  cut = c.top_k > 0 or c.top_p < 1 or c.min_p > 0
  found = sample.Sampling(
      max_tokens=c.max_tokens, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p,
      min_p=c.min_p, support=c.support if cut else 0, eos=run.tokenizer.end_ids,
      stop=tuple(text.encode() for text in c.stop))
  if found.candidates > run.cfg.vocab_size:
    raise ValueError(
        f'rl.support {c.support} and rl.top_k {c.top_k} ask for {found.candidates} candidates, '
        f'the vocabulary has {run.cfg.vocab_size}')
  return found


def build_grader(run: Any, c: Any) -> tuple[pool.Grader, dict[str, float]]:
  """The grader, with its workers started, and the weights of the rewards."""
  specs, weights = dict(c.rewards), dict(c.reward_weights)
  if not specs:
    raise ValueError('rl.rewards is empty; name at least one, as rl.rewards.NAME = REWARD')
  for name in weights:
    choose(specs, name, 'reward in rl.reward_weights')
  config_lib.at_least(1, run.config, 'rl.graders')
  grader = pool.Grader(specs, workers=c.graders, deadline_seconds=c.deadline)
  run.closing.append(grader)
  return grader, weights


def answer_field(c: Any) -> str:
  """The field that every problem must have; '' where no reward is known to read it."""
  if c.data.format == 'arithmetic':
    return ''
  wanted = c.data.answer != 'answer' or set(rewards.READS_ANSWER) & set(dict(c.rewards).values())
  return c.data.answer if wanted else ''


def build_evaluate(run: Any, c: Any, sampling: sample.Sampling, draw: Callable,
                   grader: pool.Grader, heldout: Any) -> tuple[Callable, tuple[str, ...]]:
  """The evaluation on held-out problems, and the names of what it measures."""
  e, specs = run.config.eval, dict(c.rewards)
  config_lib.at_least(1, run.config, 'eval.rows')
  config_lib.at_least(0, run.config, 'eval.pass_k')
  if not e.reward and len(specs) > 1:
    raise ValueError(f'eval.reward: which of {sorted(specs)} says that an answer is right?')
  reward = e.reward or next(iter(specs))
  choose(specs, reward, 'eval.reward')
  problems = tuple(heldout.row(i) for i in range(min(len(heldout), e.rows)))
  greedy, random = dataclasses.replace(sampling, temperature=0.0), None
  measures = ('eval/accuracy',)
  if e.pass_k:
    random = dataclasses.replace(sampling, temperature=e.temperature)
    measures += (f'eval/pass@{e.pass_k}', f'eval/mean@{e.pass_k}')
  return rl_phase.make_evaluate(
      draw, grader, run.tokenizer, problems, c.prompts * c.group, greedy, random, e.pass_k,
      reward, run.key_of('evaluation')), measures


def gated(c: Any) -> Callable:
  """What makes an optimiser one behind the gate that rl.gate describes; nothing without one."""
  if not c.gate.window:
    return lambda tx: tx
  return functools.partial(
      gate.gate, threshold=c.gate.threshold, window=c.gate.window, squared=c.gate.squared)


def build_watch(run: Any, c: Any) -> Callable | None:
  """What the train step measures of the gradient, see launch.step.make_gradient; None: nothing."""
  if not (c.watch or c.gate.window):
    return None
  head = run.specs.get('unembed', run.specs['embed'])['table']
  if not head.trainable:
    raise ValueError(
        'rl.watch and rl.gate measure the gradient of the output head, which is not trained here')
  middle = f'layer {len(run.cfg.layers) // 2}'

  def watch(grads: Any, metrics: dict) -> dict:
    sums = model.square_sums(grads, run.cfg)
    out = {'grad_norm/head': jnp.sqrt(sums['unembed']), 'grad_norm/middle': jnp.sqrt(sums[middle])}
    if 'shift/pull' in metrics:
      most = jnp.square(metrics['shift']) * metrics['shift/pull']
      out['shift/bound'] = jnp.where(
          most > 0, sums['unembed'] / jnp.where(most > 0, most, 1) - 1, 0)
    return out

  return watch


def with_drift(run: Any, evaluate: Callable | None) -> Callable:
  """The evaluation, and how far every part of the model is from the reference policy.

  drift/<part>: norm of the change over the norm it had, of the head, the embedding and each layer.
  """
  @jax.jit
  def shares(params, reference):
    params = {name: params[name] for name in reference}      # it may lack heads for tokens ahead
    change = model.square_sums(jax.tree.map(jnp.subtract, params, reference), run.cfg)
    whole = model.square_sums(reference, run.cfg)
    return {f'drift/{name}': jnp.sqrt(change[name] / whole[name]) for name in change}

  def both(params, step):
    found = evaluate(params, step) if evaluate else {}
    if 'reference' in run.weights:     # not yet in a phase before this one
      found |= {name: float(x) for name, x in shares(params, run.weights['reference']).items()}
    return found

  return both


def build_reference(run: Any, c: Any, method: Method) -> Callable:
  """enter(params, begins): puts the reference policy in place, if the method or rl.watch needs it.

  It is written into the workdir when the phase begins, and found there on resume.
  """
  scores = [r for r in compose.requests(method) if isinstance(r, Score)]
  if not c.watch and not any(r.source == REFERENCE.source for r in scores):
    return lambda params, begins: None
  path, folder = c.reference, run.workdir / 'reference'
  abstract = param.abstract(run.specs, run.shardings)
  if path:
    abstract = checkpoint.as_saved(path, abstract)
    checkpoint.check_params(path, abstract, run.cfg)
  else:
    abstract = lora.changing(abstract)

  def enter(params, begins):
    if begins:
      chosen = (checkpoint.load_params(path, abstract, run.cfg) if path
                else lora.changing(params))
      replace_params(folder, chosen, path or 'the policy at the start of the RL phase')
    # Read back: the policy's own arrays are donated to the next train step.
    run.weights['reference'] = checkpoint.load_params(folder, abstract)

  return enter


def replace_params(folder: Path, params: Any, origin: str) -> None:
  """Writes parameters; those of a beginning that was not saved are stale."""
  if jax.process_index() == 0:
    shutil.rmtree(folder, ignore_errors=True)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('reference removed')
  checkpoint.save_params(folder, params, {'from': origin})
