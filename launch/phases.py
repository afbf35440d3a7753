"""Builds the phases of a run from its config: data, terms, optimiser, train step, evaluation."""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from data import reader as reader_lib
from launch import growth, optimizer, phase_data, rl_parts, rl_phase, rollout, text_phase
from launch import config as config_lib
from launch import engine as engine_lib
from launch import mesh as mesh_lib
from launch import step as step_lib
from launch.loop import Phase
from moe import layer as moe_layer
from nn import lora, model, mtp, param
from nn.config import ModelConfig, without_drops
from rl import compose, gate, methods, sample
from rl.envs import arithmetic
from rl.names import unknown
from rl.types import Method


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
  closing: list = dataclasses.field(default_factory=list)   # readers and worker pools
  weights: dict = dataclasses.field(default_factory=dict)   # {source: parameters}, but the policy's

  def close(self) -> None:
    while self.closing:
      self.closing.pop().close()

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
        digits=c.digits, operands=c.operands, ops=c.ops, worked=c.worked, pad=c.pad,
        backwards=c.backwards)
    sets = arithmetic.split(kind, self.config.seed, c.train, c.demos, c.heldout)
    return dict(zip(('train', 'demos', 'heldout'), sets))


@dataclasses.dataclass(frozen=True)
class Built:
  """A phase, and what its state and memory are made of.

  The phase in which the model grows is two: one before, and one after, with the same data, schedule
  and name.
  """
  phase: Phase
  run: Run                         # with the model as it is in this phase
  tx: optax.GradientTransformationExtraArgs
  reset_optimizer: bool
  state_shardings: step_lib.TrainState
  memory: dict                     # what a fresh phase remembers
  contract: dict                   # what its data depend on
  check: Callable                  # saved contract -> None; refuses other data
  restore: Callable                # memory -> None: puts readers back to their place
  enter: Callable                  # (params, whether the phase begins) -> None
  measures: tuple                  # metrics of its evaluation that can say which step is best
  tokens: int                      # of a step, at most
  length: int                      # positions of a row
  left_out: Callable               # () -> {fault: (rows, first message)}: rows that are not used
  gradient: Callable | None = None      # (params, batch) -> that of one optimiser step; text only
  evaluate_as: Callable | None = None   # run -> the evaluation, of that run's model; RL only
  growth: 'Growth | None' = None        # what happens when it begins


class Growth(NamedTuple):
  """The model grows."""
  options: growth.Options
  before: Built                    # the same phase with the model as it was


def plan(config: Any) -> list[tuple[str, int, int]]:
  """(phase, first step, last step) in the order of the run; the steps of all are one count.

  The phase in which the model grows is there twice, before and after.
  """
  config_lib.at_least(0, config, 'seed')
  if not config.phases:
    raise ValueError('phases is empty; name at least one of pretrain, sft, rl')
  if twice := sorted({p for p in config.phases if config.phases.count(p) > 1}):
    raise ValueError(f'phases {config.phases} names {twice} twice')
  out, first = [], 0
  for name in config.phases:
    if name not in config_lib.PHASES:
      raise ValueError(unknown('phase', name, config_lib.PHASES))
    config_lib.at_least(0, config, f'{name}.steps')
    out.append((name, first, first + config[name].steps))
    first += config[name].steps
  config_lib.at_least(0, config, 'upcycle.at_step')
  return grown_plan(out, config.upcycle.at_step) if config.upcycle.at_step else out


def grown_plan(plan: list[tuple[str, int, int]], step: int) -> list[tuple[str, int, int]]:
  """The plan with the phase in two in which the step is."""
  for i, (name, first, last) in enumerate(plan):
    if name != 'rl' and first < step < last:
      return [*plan[:i], (name, first, step), (name, step, last), *plan[i + 1:]]
  spans = ', '.join(f'{name} from {first} to {last}' for name, first, last in plan)
  raise ValueError(f'upcycle.at_step is {step}, wanted a step between the ends of a phase of text '
                   f'(pretrain, sft); this run has {spans}')


def build_all(run: Run, plan: list[tuple[str, int, int]]) -> list[Built]:
  """All phases. Those beside RL are evaluated as RL is, too: accuracy is what they prepare."""
  built = []
  for name, first, last in plan:
    steps = [s for other, *ends in plan if other == name for s in ends]
    grows = built and built[-1].phase.name == name
    if grows:
      o = growth.read_options(run.config, run.cfg)
      growth.check(o, run.specs, abstract_state(built[-1]).opt_state)
      cfg = growth.grown(run.cfg, o.factor)
      run = dataclasses.replace(run, cfg=cfg, specs=model.specs(cfg))
    b = part(build(run, name, min(steps), max(steps)), first, last)
    built.append(dataclasses.replace(b, growth=Growth(o, built[-1])) if grows else b)
  rl = next((b for b in built if b.phase.kind == 'rl' and b.phase.evaluate), None)
  if rl:
    built = [b if b is rl else evaluated_too(b, rl) for b in built]
  # Of a phase in two parts the second one may reach the aim.
  return [with_aim(b, run.config[b.phase.name].until) if last == max(
      end for name, _, end in plan if name == b.phase.name) else b
      for b, (_, _, last) in zip(built, plan)]


def part(built: Built, first: int, last: int) -> Built:
  """A phase's steps from first to last; the schedule is that of the whole phase."""
  rate, before = built.phase.rate, first - built.phase.first
  return dataclasses.replace(built, phase=dataclasses.replace(
      built.phase, first=first, last=last, rate=lambda step: rate(step + before)))


def abstract_state(b: Built) -> step_lib.TrainState:
  """Shapes, dtypes and shardings of a phase's state."""
  return abstract(b.run.specs, b.tx, b.state_shardings)


def abstract(specs: Any, tx: Any, shardings: step_lib.TrainState) -> step_lib.TrainState:
  """Shapes, dtypes and shardings of a state."""
  params = param.abstract(specs)
  opt_state = jax.eval_shape(tx.init, param.split(params, specs)[0])
  plain = step_lib.TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(place, plain, shardings)


def evaluated_too(built: Built, other: Built) -> Built:
  """The phase, whose evaluation is followed by that of another one."""
  own, more = built.phase.evaluate, other.phase.evaluate
  if built.run is not other.run:
    more = other.evaluate_as(built.run)
  both = lambda params, step: (own(params, step) if own else {}) | more(params, step)
  return dataclasses.replace(built, phase=dataclasses.replace(built.phase, evaluate=both),
                             measures=built.measures + other.measures)


def with_aim(built: Built, text: str) -> Built:
  """The phase, ended by what 'eval/loss<=0.5' or 'eval/accuracy>=0.9' asks; '': by its steps."""
  if not text:
    return built
  key, parts = f'{built.phase.name}.until', re.fullmatch(r'(\S+?)\s*(<=|>=)\s*(\S+)', text.strip())
  try:
    name, sign, bound = parts.group(1), parts.group(2), float(parts.group(3))
  except (AttributeError, ValueError):
    raise ValueError(f"{key} is {text!r}, wanted a metric of an evaluation and a bound, "
                     "as in 'eval/loss<=0.5' or 'eval/accuracy>=0.9'") from None
  if name not in built.measures:
    raise ValueError(f'{key} is {text!r}; the evaluations of this phase measure '
                     f'{sorted(built.measures) or "nothing, as no rows are held out"}')
  reached = lambda now: now[name] <= bound if sign == '<=' else now[name] >= bound
  return dataclasses.replace(built, phase=dataclasses.replace(built.phase, reached=reached))


def build(run: Run, name: str, first: int, last: int) -> Built:
  """One phase, ready to run; opens its data, compiles nothing."""
  config_lib.at_least(1, run.config, 'eval.every', f'{name}.microbatches')
  return (build_rl if name == 'rl' else build_text)(run, name, first, last)


def build_optimizer(run: Run, c: Any, steps: int, wrap: Callable = lambda tx: tx,
                    ) -> tuple[Any, Callable, step_lib.TrainState]:
  """Optimiser, rate (step of the phase -> learning rate), shardings of the train state."""
  tx, rate = optimizer.from_config(run.specs, c.optimizer, steps)
  tx = wrap(tx)
  opt_state = optimizer.state_shardings(tx, run.specs, run.shardings, run.mesh)
  return tx, rate, step_lib.TrainState(run.replicated, run.shardings, opt_state)


def build_step(run: Run, terms: tuple, tx: Any, shardings: Any, rows: int, microbatches: int,
               where: str, replay: bool = False, watch: Callable | None = None) -> Callable:
  """The jitted train step; refuses batches that mesh and microbatches do not divide."""
  ways = mesh_lib.batch_ways(run.mesh)
  if rows < 1 or rows % (ways * microbatches):
    raise ValueError(
        f'{where}: {rows} rows of an optimiser step cannot be divided into {microbatches} '
        f'microbatches on {ways} devices; take a multiple of {ways * microbatches}')
  moe_layer.check_buffer(run.cfg, run.mesh.shape)
  loss = step_lib.make_loss(engine_lib.make_forward(run.cfg, replay), terms)
  train_step = step_lib.make_train_step(
      loss, tx, run.specs, microbatches,
      lambda params, load: model.after_update(params, run.cfg, load), watch)
  return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, run.replicated))


def build_gradient(run: Run, terms: tuple, microbatches: int) -> Callable:
  """(params, batch) -> the gradient of the trainable parameters, of one optimiser step."""
  loss = step_lib.make_loss(engine_lib.make_forward(without_drops(run.cfg)), terms)
  gradient = step_lib.make_gradient(loss, run.specs, microbatches)
  return jax.jit(lambda params, batch: gradient(params, batch)[0],
                 out_shardings=param.split(run.shardings, run.specs)[0])


def flops(run: Run, method: Method, length: int) -> int:
  """Per token of a train step, with the heads of multi-token prediction that it trains."""
  heads = mtp.wanted(compose.wants(method.terms), run.cfg)
  return model.flops(run.cfg, length, sum(heads.values()))   # a pass for each kind of detachment


def check_length(run: Run, length: int, what: str) -> None:
  if length > run.cfg.max_length:
    raise ValueError(
        f'{what} is {length} tokens, longer than model.max_length {run.cfg.max_length}')


def build_text(run: Run, name: str, first: int, last: int) -> Built:
  """Pretraining and SFT: a reader's rows under maximum likelihood."""
  c = run.config[name]
  config_lib.at_least(1, run.config, f'{name}.rows', 'streams')
  config_lib.at_least(2, run.config, f'{name}.length')
  check_length(run, c.length, f'{name}.length')
  method = text_phase.make_method(f'{name}.mtp', c.mtp, run.cfg.mtp.depth, first)
  tx, rate, shardings = build_optimizer(run, c, last - first)
  train_step = build_step(run, method.terms, tx, shardings, c.rows, c.microbatches, name)
  joined = c.data.format in ('text', 'tokens')
  place = {'process': jax.process_index(), 'processes': jax.process_count()}
  reader = reader_lib.Reader(
      phase_data.parts(run, name, c.length, c.data, 'train'), length=c.length, rows=c.rows,
      seed=run.config.seed, streams=run.config.streams, workers=c.data.workers,
      packing_kind='split' if joined else 'fit' if c.data.pack else 'pad',
      shuffle=c.data.shuffle, **place)
  run.closing.append(reader)
  once = lambda examples, faults: reader_lib.once(
      examples, length=c.length, rows=c.rows, dropped=faults, **place)
  evaluate = None
  if phase_data.has_heldout(c.data):
    heldout = {p.name: functools.partial(once, p.examples)
               for p in phase_data.parts(run, name, c.length, c.data, 'heldout')}
    evaluate = text_phase.make_evaluate(
        engine_lib.make_forward(without_drops(run.cfg)), heldout, run.mesh, run.cfg.mtp.depth)
  phase = Phase(
      name=name, kind=name, first=first, last=last,
      feed=text_phase.make_feed(reader, method, run.mesh), train_step=train_step, rate=rate,
      evaluate=evaluate, evaluate_every=run.config.eval.every,
      flops_per_token=flops(run, method, c.length))
  return Built(
      phase=phase, run=run, tx=tx, reset_optimizer=c.reset_optimizer, state_shardings=shardings,
      memory={'reader': reader.state()}, contract=reader.contract(), check=reader.check,
      restore=lambda memory: reader.restore(memory['reader']),
      enter=lambda params, begins: None,
      measures=('eval/loss', 'eval/token_accuracy') if evaluate else (),
      tokens=c.rows * c.length, length=c.length, left_out=reader.dropped,
      gradient=build_gradient(run, method.terms, c.microbatches))


def build_rl(run: Run, name: str, first: int, last: int) -> Built:
  """Rollouts by a method, rewards by a grader."""
  c = run.config[name]
  config_lib.at_least(
      1, run.config, 'rl.prompts', 'rl.group', 'rl.max_prompt', 'rl.max_tokens', 'rl.parts',
      'rl.uses', 'rl.max_empty', 'log.samples_every')
  config_lib.at_least(0, run.config, 'rl.refills')
  num_rows, length = c.prompts * c.group, c.max_prompt + c.max_tokens
  if num_rows % (2 * c.parts):
    raise ValueError(
        f'rl.prompts {c.prompts} x rl.group {c.group} rows cannot be divided into rl.parts '
        f'{c.parts} of even size; take a multiple of {2 * c.parts}')
  check_length(run, length, 'rl.max_prompt + rl.max_tokens')
  replay = c.routing_replay
  if replay and not any(ffn == 'moe' for _, ffn in run.cfg.layers):
    raise ValueError('rl.routing_replay is set, but no layer has experts whose choice could be '
                     "replayed; set model.ffn to 'moe', or leave rl.routing_replay out")
  method = rl_phase.watched(
      methods.build(c.methods, config_lib.method_options(c), max_tokens=c.max_tokens,
                    mtp_depth=run.cfg.mtp.depth), c.watch)
  tx, rate, shardings = build_optimizer(run, c, last - first, rl_parts.gated(c))
  train_step = build_step(
      run, method.terms, tx, shardings, num_rows // c.parts, c.microbatches, name, replay,
      rl_parts.build_watch(run, c))
  sampling = rl_parts.sampling_of(run, c)
  grader, weights = rl_parts.build_grader(run, c)
  settings = rl_phase.Settings(
      prompts=c.prompts, group=c.group, parts=c.parts, uses=c.uses, refills=c.refills,
      max_empty=c.max_empty, sampling=sampling, weights=weights, seed=run.config.seed)
  answer = rl_parts.answer_field(c)
  prompts = phase_data.prompts(run, c.data, c.max_prompt, 'train', answer)
  table = sample.pack_bytes(run.tokenizer.token_bytes(), run.cfg.vocab_size) if c.stop else None
  draw_as = lambda run, **more: engine_lib.make_sample(
      run.cfg, run.mesh, c.max_prompt, table, **more)
  draw = draw_as(run, record=True)
  score = engine_lib.make_score(run.cfg, run.mesh, num_rows // c.parts // c.microbatches, replay)

  def make_engine(params):
    held = {name: lora.on_base(w, params) for name, w in run.weights.items()} | {'policy': params}

    def sample_rows(source, texts, group, changes, key):
      known = {k: v for k, v in changes.items() if k in vars(sampling)}
      return draw(held[source.name], texts, group, dataclasses.replace(sampling, **known), key)

    def score_rows(source, *rest):
      return score(held[source.name], *rest)

    return rollout.Engine(sample_rows, run.tokenizer.encode, score_rows)

  root, every = run.key_of('rollout'), run.config.log.samples_every
  feed = rl_phase.make_feed(
      method, rl_phase.make_task(prompts.take, run.tokenizer, grader, settings), make_engine,
      settings, place=lambda batch: mesh_lib.put_global(batch, run.mesh),
      tokenizer=run.tokenizer, show=lambda step: step % every == 0 or step == first + 1,
      key_of=lambda step: jax.random.fold_in(root, step))
  evaluate, evaluate_as, measures = None, None, ()
  if phase_data.has_heldout(c.data):
    heldout = phase_data.prompts(run, c.data, c.max_prompt, 'heldout', answer)
    evaluate, measures = rl_parts.build_evaluate(run, c, sampling, draw, grader, heldout)
    evaluate_as = lambda run: rl_parts.build_evaluate(
        run, c, sampling, draw_as(run), grader, heldout)[0]
  if c.watch:
    evaluate = rl_parts.with_drift(run, evaluate)
  phase = Phase(
      name=name, kind='rl', first=first, last=last, feed=feed, train_step=train_step, rate=rate,
      evaluate=evaluate, evaluate_every=run.config.eval.every,
      flops_per_token=flops(run, method, length),
      refused=(lambda s: bool(gate.refused(s))) if c.gate.window else (lambda s: False))
  identity = {'prompts': prompts.identity()}
  return Built(
      phase=phase, run=run, tx=tx, reset_optimizer=c.reset_optimizer, state_shardings=shardings,
      memory={'prompts': {'cursor': 0}} | method.state, contract=identity,
      check=lambda saved: reader_lib.check(saved, identity), restore=lambda memory: None,
      enter=rl_parts.build_reference(run, c, method), measures=measures, tokens=num_rows * length,
      length=length, left_out=lambda: prompts.dropped, evaluate_as=evaluate_as)
