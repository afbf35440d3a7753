"""Builds the phases of a run from its config: data, terms, optimiser, train step, evaluation."""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

from data import build as data_lib
from data import fields, mixture, sources
from data import prompts as prompts_lib
from data import reader as reader_lib
from launch import checkpoint
from launch import config as config_lib
from launch import engine as engine_lib
from launch import mesh as mesh_lib
from launch import optimizer, rl_phase, rollout, text_phase
from launch import step as step_lib
from launch.loop import Phase
from nn import model, param
from nn.config import ModelConfig
from rl import compose, methods, sample
from rl.envs import arithmetic
from rl.rewards import pool
from rl.types import REFERENCE, Score


@dataclasses.dataclass
class Run:
  """What all phases of a run share."""
  config: Any                      # launch.config.Tracked
  cfg: ModelConfig
  specs: Any
  mesh: jax.sharding.Mesh
  tokenizer: Any
  workdir: Path
  key: jax.Array                   # of the run
  closing: list = dataclasses.field(default_factory=list)   # readers and worker pools, to be closed at the end
  weights: dict = dataclasses.field(default_factory=dict)   # {source name: parameters}, beside the policy's

  def close(self) -> None:
    for thing in self.closing:
      thing.close()

  def key_of(self, name: str) -> jax.Array:
    """The key of one stream of noise."""
    return jax.random.fold_in(self.key, zlib.crc32(name.encode()))

  @functools.cached_property
  def shardings(self) -> Any:
    return param.shardings(self.specs, self.mesh, dict(self.cfg.rules))

  @functools.cached_property
  def replicated(self) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

  @functools.cached_property
  def task(self) -> dict[str, list[dict]]:
    """The generated arithmetic problems: {'train', 'demos', 'heldout'}."""
    c = self.config.arithmetic
    kind = arithmetic.Arithmetic(
        digits=c.digits, operands=c.operands, ops=c.ops, worked=c.worked, pad=c.pad, backwards=c.backwards)
    train, demos, heldout = arithmetic.split(kind, self.config.seed, c.train, c.demos, c.heldout)
    return {'train': train, 'demos': demos, 'heldout': heldout}


@dataclasses.dataclass(frozen=True)
class Built:
  """A phase, and what its state and memory are made of."""
  phase: Phase
  tx: optax.GradientTransformationExtraArgs
  reset_optimizer: bool
  state_shardings: step_lib.TrainState
  memory: dict                     # what a fresh phase remembers
  contract: dict                   # what its data depend on
  check: Callable                  # saved contract -> None; refuses other data
  restore: Callable                # memory -> None: puts readers back to their place
  enter: Callable                  # params -> None: called when the phase begins or is resumed
  tokens: int                      # of a step, at most
  length: int                      # positions of a row
  report: Callable                 # () -> {what: (rows, first message)}: rows that were left out


def plan(config: Any) -> list[tuple[str, int, int]]:
  """(phase, first step, last step) in the order of the run; the steps of all phases are one count."""
  if not config.phases:
    raise ValueError('phases is empty; name at least one of pretrain, sft, rl')
  if twice := sorted({p for p in config.phases if config.phases.count(p) > 1}):
    raise ValueError(f'phases {config.phases} names {twice} twice')
  out, first = [], 0
  for name in config.phases:
    if name not in config_lib.PHASES:
      raise ValueError(f'there is no phase {name!r}' + config_lib.hint(name, config_lib.PHASES))
    out.append((name, first, first + config[name].steps))
    first += config[name].steps
  return out


def build(run: Run, name: str, first: int, last: int) -> Built:
  """One phase, ready to run; opens its data, compiles nothing."""
  return (build_rl if name == 'rl' else build_text)(run, name, first, last)


def build_optimizer(run: Run, c: Any, steps: int) -> tuple[Any, Callable, step_lib.TrainState]:
  """Optimiser, rate (step of the phase -> learning rate), and the shardings of the train state."""
  tx, rate = optimizer.from_config(run.specs, c.optimizer, steps)
  opt_state = optimizer.state_shardings(tx, run.specs, run.shardings, run.mesh)
  return tx, rate, step_lib.TrainState(run.replicated, run.shardings, opt_state)


def build_step(run: Run, terms: tuple, tx: Any, shardings: Any, rows: int, microbatches: int, where: str) -> Callable:
  """The jitted train step; refuses batches that mesh and microbatches do not divide."""
  ways = mesh_lib.batch_ways(run.mesh)
  if rows % (ways * microbatches):
    raise ValueError(f'{where}: {rows} rows of an optimiser step cannot be divided into {microbatches} microbatches '
                     f'on {ways} devices; take a multiple of {ways * microbatches}')
  loss = step_lib.make_loss(engine_lib.make_forward(run.cfg), terms)
  train_step = step_lib.make_train_step(loss, tx, run.specs, microbatches)
  return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, run.replicated))


def form_of(d: Any) -> fields.Format:
  """How rows of a phase's data become text; reads only the fields that its format has."""
  if d.format == 'arithmetic':
    return fields.Format(kind='problem')
  if d.format == 'problem':
    return fields.Format(kind='problem', prompt=d.prompt, response=d.response, prompt_template=d.prompt_template)
  name = {'text': 'text', 'tokens': 'tokens', 'chat': 'messages'}.get(d.format)
  return fields.Format(kind=d.format, **({name: d[name]} if name else {}))


def cache_of(run: Run, d: Any) -> str:
  """The folder of file indexes."""
  return d.cache or str(run.workdir / 'data')


def parts_of(run: Run, c: Any, side: str) -> tuple[mixture.Part, ...]:
  """What a text phase trains on (side train), or what is kept for its evaluation (heldout); () if nothing is."""
  d = c.data
  long = 'drop' if d.format in ('problem', 'chat', 'arithmetic') and d.skip_long_rows else 'error'
  options = {'form': form_of(d), 'length': c.length, 'long': long}
  if d.format == 'arithmetic':
    rows = sources.Listed(run.task['demos' if side == 'train' else 'heldout'], 'arithmetic')
    return (mixture.Part('arithmetic', data_lib.of_rows(rows, run.tokenizer, **options)),)
  own = side == 'heldout' and d.heldout_files
  names = d.heldout_files if own else d.files
  if not names:
    raise ValueError(f'data.files is empty, and format {d.format!r} reads files')
  if side == 'heldout' and not own and not d.heldout:
    return ()
  weights = d.weights if side == 'train' and d.weights else (1.0,) * len(names)
  if len(weights) != len(names):
    raise ValueError(f'data.weights has {len(weights)} numbers for {len(names)} data.files')
  share = 0.0 if d.heldout_files else d.heldout
  return tuple(
      mixture.Part(name, data_lib.examples(
          name, run.tokenizer, seed=run.config.seed, cache=cache_of(run, d), heldout=share,
          side='train' if own else side, skip_bad_rows=d.skip_bad_rows, **options), weight)
      for name, weight in zip(names, weights))


def build_text(run: Run, name: str, first: int, last: int) -> Built:
  """Pretraining and SFT: a reader's rows under maximum likelihood."""
  c = run.config[name]
  method = methods.build(('sft',), {})
  tx, rate, shardings = build_optimizer(run, c, last - first)
  train_step = build_step(run, method.terms, tx, shardings, c.rows, c.microbatches, name)
  check_length(run, c.length, f'{name}.length')
  joined = c.data.format in ('text', 'tokens')
  place = {'process': jax.process_index(), 'processes': jax.process_count()}
  reader = reader_lib.Reader(
      parts_of(run, c, 'train'), length=c.length, rows=c.rows, seed=run.config.seed, streams=run.config.streams,
      packing_kind='split' if joined else 'fit' if c.data.pack else 'pad', workers=c.data.workers, **place)
  run.closing.append(reader)
  heldout = parts_of(run, c, 'heldout')

  def held_rows():
    return itertools.chain.from_iterable(
        reader_lib.once(p.examples, length=c.length, rows=c.rows, **place) for p in heldout)

  evaluate = text_phase.make_evaluate(engine_lib.make_forward(run.cfg), held_rows, run.mesh) if heldout else None
  phase = Phase(
      name=name, kind=name, first=first, last=last, feed=text_phase.make_feed(reader, method, run.mesh),
      train_step=train_step, rate=rate, evaluate=evaluate, evaluate_every=run.config.eval.every,
      flops_per_token=model.flops(run.cfg, c.length))
  return Built(
      phase=phase, tx=tx, reset_optimizer=c.reset_optimizer, state_shardings=shardings,
      memory={'reader': reader.state()}, contract=reader.contract(), check=reader.check,
      restore=lambda memory: reader.restore(memory['reader']), enter=lambda params: None, tokens=c.rows * c.length, length=c.length,
      report=lambda: {f'rows_{fault}': (n, why) for fault, (n, why) in reader.dropped().items()})


def check_length(run: Run, length: int, what: str) -> None:
  if length > run.cfg.max_length:
    raise ValueError(f'{what} is {length} tokens, longer than model.max_length {run.cfg.max_length}')


def open_prompts(run: Run, d: Any, max_prompt: int, side: str) -> prompts_lib.Prompts:
  """Problems to sample answers to, or (side heldout) those kept for evaluation."""
  if d.format == 'arithmetic':
    rows = sources.Listed(run.task[side], 'arithmetic')
    return prompts_lib.Prompts(
        rows, run.tokenizer, form=form_of(d), max_prompt=max_prompt, seed=run.config.seed, shuffle=side == 'train')
  own = side == 'heldout' and d.heldout_files
  if not d.files:
    raise ValueError(f'rl.data.files is empty, and format {d.format!r} reads files')
  rows = sources.load(d.heldout_files if own else d.files, cache_of(run, d))
  if not d.heldout_files and d.heldout:
    rows = sources.Section(rows, *sources.split(len(rows), d.heldout, side))
  return prompts_lib.Prompts(
      rows, run.tokenizer, form=form_of(d), max_prompt=max_prompt, seed=run.config.seed,
      shuffle=side == 'train' and d.shuffle, long='drop' if d.skip_long_rows else 'error', skip_bad_rows=d.skip_bad_rows)


def build_rl(run: Run, name: str, first: int, last: int) -> Built:
  """Rollouts by a method, rewards by a grader."""
  c, evaluation = run.config[name], run.config.eval
  num_rows = c.prompts * c.group
  if num_rows % (2 * c.parts):
    raise ValueError(f'rl.prompts {c.prompts} x rl.group {c.group} rows cannot be divided into rl.parts {c.parts} of '
                     f'even size; take a multiple of {2 * c.parts}')
  check_length(run, c.max_prompt + c.max_tokens, 'rl.max_prompt + rl.max_tokens')
  method = rl_phase.watched(methods.build(c.methods, config_lib.method_options(c), max_tokens=c.max_tokens))
  tx, rate, shardings = build_optimizer(run, c, last - first)
  train_step = build_step(run, method.terms, tx, shardings, num_rows // c.parts, c.microbatches, name)
  cut = c.top_k > 0 or c.top_p < 1 or c.min_p > 0
  sampling = sample.Sampling(
      max_tokens=c.max_tokens, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p, min_p=c.min_p,
      support=c.support if cut else 0, eos=(run.tokenizer.eos_id,), stop=tuple(s.encode() for s in c.stop))
  prompts = open_prompts(run, c.data, c.max_prompt, 'train')
  field = 'answer' if c.data.format == 'arithmetic' else c.data.answer
  answered = lambda rows: tuple({**row, 'answer': row.get(field, '')} for row in rows)
  take = lambda cursor, n: answered(prompts.take(cursor, n))
  grader = pool.Grader(dict(c.rewards), workers=c.graders, deadline_seconds=c.deadline)
  run.closing.append(grader)
  settings = rl_phase.Settings(
      prompts=c.prompts, group=c.group, parts=c.parts, uses=c.uses, refills=c.refills, max_empty=c.max_empty,
      sampling=sampling, weights=dict(c.reward_weights), seed=run.config.seed)
  table = sample.pack_bytes(run.tokenizer.token_bytes(), run.cfg.vocab_size) if c.stop else None
  draw = engine_lib.make_sample(run.cfg, run.mesh, c.max_prompt, table)
  score = engine_lib.make_score(run.cfg, run.mesh, num_rows // c.parts // c.microbatches)

  def make_engine(params):
    weights = run.weights | {'policy': params}

    def sample_rows(source, texts, group, changes, key):
      now = dataclasses.replace(sampling, **{k: v for k, v in changes.items() if k in vars(sampling)})
      return draw(weights[source.name], texts, group, now, key)

    return rollout.Engine(sample_rows, run.tokenizer.encode,
                          lambda source, *rest: score(weights[source.name], *rest))

  root = run.key_of('rollout')
  every = run.config.log.samples_every
  feed = rl_phase.make_feed(
      method, rl_phase.make_task(take, run.tokenizer, grader, settings), make_engine, settings,
      place=lambda batch: mesh_lib.put_global(batch, run.mesh),
      decode=lambda rows, n: rl_phase.response_text(run.tokenizer, rows, n),
      show=lambda step: step % every == 0 or step == first + 1, reads=lambda step: jax.random.fold_in(root, step))
  evaluate = None
  if c.data.format == 'arithmetic' or c.data.heldout or c.data.heldout_files:
    heldout = open_prompts(run, c.data, c.max_prompt, 'heldout')
    problems = answered(heldout.row(i) for i in range(min(len(heldout), evaluation.rows)))
    random = dataclasses.replace(sampling, temperature=evaluation.temperature) if evaluation.pass_k > 1 else None
    evaluate = rl_phase.make_evaluate(
        draw, grader, run.tokenizer, problems, num_rows, dataclasses.replace(sampling, temperature=0.0), random,
        evaluation.pass_k, next(iter(c.rewards)), run.key_of('evaluation'))
  phase = Phase(
      name=name, kind='rl', first=first, last=last, feed=feed, train_step=train_step, rate=rate, evaluate=evaluate,
      evaluate_every=evaluation.every, flops_per_token=model.flops(run.cfg, c.max_prompt + c.max_tokens))
  memory = {'prompts': {'cursor': 0}} | method.state
  identity = {'prompts': prompts.identity()}
  reference = any(r.source == REFERENCE.source for r in compose.requests(method) if isinstance(r, Score))
  return Built(
      phase=phase, tx=tx, reset_optimizer=c.reset_optimizer, state_shardings=shardings, memory=memory,
      contract=identity, check=lambda saved: reader_lib.check(saved, identity), restore=lambda memory: None,
      enter=lambda params: keep_reference(run, c.reference, params) if reference else None,
      tokens=num_rows * (c.max_prompt + c.max_tokens), length=c.max_prompt + c.max_tokens,
      report=lambda: {f'rows_{fault}': (n, why) for fault, (n, why) in prompts.dropped.items()})


def keep_reference(run: Run, path: str, params: Any) -> None:
  """Puts the reference policy in its place: as first written into the workdir, or now from `path` or the policy."""
  folder = run.workdir / 'reference'
  abstract = param.abstract(run.specs, run.shardings)
  if not folder.exists():
    chosen = checkpoint.load_params(path, abstract) if path else params
    checkpoint.save_params(folder, chosen, {'from': path or 'the policy at the start of the RL phase'})
  # Read back: the policy's own arrays are donated to the next train step.
  run.weights['reference'] = checkpoint.load_params(folder, abstract)
