"""The loss and the train step: one pair for pretraining, SFT, preference learning and RL.

n rows of one optimiser step, T positions, M microbatches. A term is known here only as a function
of a View.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from moe import router
from nn import param
from nn.types import LOGP, Batch, Want
from rl import compose, gate, losses
from rl.types import OLD, Term, View, label


@flax.struct.dataclass
class TrainState:
  """Everything on the devices that a run must keep.

  What stages and readers remember lives beside it, on the host.
  """
  updates: jax.Array                   # [] int32, accepted optimiser steps
  params: Any
  opt_state: Any


def make_loss(forward: Callable, terms: tuple[Term, ...]) -> tuple[Callable, Callable | None]:
  """The loss of a list of terms, sum over terms of coef * sum(weight * value).

  Args:
    forward: (params, batch, wants) -> ({Want: [n, T, ...] float32}, nn.types.Output).
    terms: evaluated in order, on one forward pass.

  Returns:
    loss: (params, batch, sums) -> (scalar, {metric: scalar}); additive over rows, so microbatches
      and devices add up. A model with experts also has metrics['load'], {layer index: [E] int32},
      perhaps metrics['dropped'] likewise, and its auxiliary losses in the sum. What a term reports
      beside its value is a weighted sum; `means` divides it by the weight.
    sums: (params, batch) -> {term: {name: []}}, detached, also additive; None if no term asks for
      it. `loss` takes the totals over the optimiser step, or {} when its batch is all of it.
  """
  wants = compose.wants(terms)
  summed = {t.name for t in terms if t.sums}
  for term in terms:
    if term.sums and summed & set(term.after):
      raise ValueError(
          f'term {term.name!r} forms sums over values of {sorted(summed & set(term.after))}, which '
          'need sums themselves; one pass over the microbatches cannot give both')

  def view_of(term, scores, batch, done, sums):
    given = {n: read(n, scores, batch) for n in term.needs}
    return View(given, batch, batch.masks[term.mask], {name: done[name] for name in term.after},
                sums.get(term.name))

  def read(need, scores, batch):
    if isinstance(need, Want):
      return scores[need]
    # The one step that is taken with the weights of collect.
    if need == OLD and label(OLD) not in batch.data:
      return jax.lax.stop_gradient(scores[LOGP])
    return batch.data[label(need)]

  def loss(params, batch: Batch, sums):
    scores, output = forward(params, batch, wants)
    total, done, metrics = jnp.float32(0), {}, dict(output.metrics)
    # They are means over the tokens there are and not additive: each microbatch has them times its
    # share of the weight.
    share = jnp.sum(batch.weights[terms[0].name]) if output.aux_loss else 0.0
    for name, value in output.aux_loss.items():
      metrics[f'aux/{name}'] = share * value
      total += share * value
    if output.load:
      metrics |= {'load': output.load, 'dropped': output.dropped}
    if batch.routes is not None:
      metrics |= route_metrics(output.own_routes, batch)
    for term in terms:
      view = view_of(term, scores, batch, done, sums)
      if term.sums and view.sums is None:
        view = view_of(
            term, scores, batch, done, {term.name: jax.lax.stop_gradient(term.sums(view))})
      value, extra = term.value(view)
      done[term.name] = jax.lax.stop_gradient(value)
      weight = batch.weights[term.name]
      metrics[term.name] = losses.weighted_sum(value, weight)
      metrics |= {f'{term.name}/{k}': losses.weighted_sum(x, weight) for k, x in extra.items()}
      metrics |= {f'{term.name}/weight': jnp.sum(weight)} if extra else {}
      total += batch.coef[term.name] * metrics[term.name]
    return total, metrics | {'loss': total}

  def sums(params, batch: Batch):
    scores, _ = forward(params, batch, wants)
    read = {name for t in terms if t.sums for name in t.after}
    out, done = {}, {}
    for term in terms:
      view = view_of(term, scores, batch, done, {})
      if term.sums:
        out[term.name] = jax.lax.stop_gradient(term.sums(view))
      elif term.name in read:
        done[term.name] = jax.lax.stop_gradient(term.value(view)[0])
    return out

  return loss, (sums if summed else None)


def means(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """What terms report as weighted means, of a whole optimiser step's metrics.

  Weights need not sum to 1.
  """
  weights = {name.removesuffix('weight'): x
             for name, x in metrics.items() if name.endswith('/weight')}
  out = {}
  for name, x in metrics.items():
    prefix = name[:name.rfind('/') + 1]
    if name not in (f'{p}weight' for p in weights):
      out[name] = (x / jnp.where(weights[prefix] == 0, 1, weights[prefix])
                   if prefix in weights else x)
  return out


def split(batch: Batch, microbatches: int) -> Batch:
  """Row i goes to microbatch i % M, on the device where it is; scalars go to all.

  Leaves [n, ...] -> [M, n / M, ...].
  """
  def one(x):
    if x.ndim == 0:
      return jnp.broadcast_to(x, (microbatches,))
    return x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)
  return jax.tree.map(one, batch)


def total(f: Callable, batch: Batch, microbatches: int) -> Any:
  """Sum of f over microbatches, one at a time."""
  if microbatches == 1:
    return f(batch)
  parts = split(batch, microbatches)
  shapes = jax.eval_shape(f, jax.tree.map(lambda x: x[0], parts))
  zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(lambda acc, part: (jax.tree.map(jnp.add, acc, f(part)), None), zero, parts)[0]


def make_gradient(
    loss: tuple[Callable, Callable | None], specs: Any, microbatches: int = 1,
    watch: Callable | None = None,
) -> Callable:
  """(params, batch) -> (gradient of trainable parameters, {metric: scalar}) of one step.

  Args:
    watch: (gradient, metrics) -> {metric: scalar}; it sees the head's gradient by itself, as
      'unembed', where the model is tied, too.
  """
  value, sums = loss
  tied = watch is not None and 'unembed' not in specs

  def gradient(params, batch: Batch):
    trainable, frozen = param.split(params, specs)
    if tied:
      trainable = trainable | {'unembed': trainable['embed']}
    totals = {}
    if sums and microbatches > 1:
      totals = total(lambda part: sums(params, part), batch, microbatches)

    def one(part):
      return jax.grad(
          lambda t: value(param.merge(t, frozen), part, totals), has_aux=True)(trainable)

    grads, metrics = total(one, batch, microbatches)
    metrics = means(metrics)
    if watch:
      metrics |= watch(grads, metrics)
    if tied:
      grads = dict(grads)
      grads['embed'] = jax.tree.map(jnp.add, grads['embed'], grads.pop('unembed'))
    return grads, metrics

  return gradient


def make_train_step(
    loss, tx: optax.GradientTransformationExtraArgs, specs: Any, microbatches: int = 1,
    after_update: Callable | None = None, watch: Callable | None = None,
) -> Callable:
  """One optimiser step, to be jitted with the state donated.

  Args:
    loss: what `make_loss` returns.
    tx: over the trainable parameters; its update takes learning_rate and use (which use of these
      rows) by name, and with a watch head_norm. It may refuse a gradient, see `rl.gate`.
    specs: the model's table, nested dict of nn.param.Spec.
    microbatches: M; must divide the rows of a batch.
    after_update: (params, load) -> params, what changes outside the gradient, once per accepted
      step: selection biases, on the loads of the whole step; None: nothing does.
    watch: see `make_gradient`; must give 'grad_norm/head'.

  Returns:
    train_step(state, batch, learning_rate []) -> (state, metrics). A step whose loss or gradient is
    not finite changes nothing and says so in metrics['nonfinite']; one that tx refuses changes only
    what the gate remembers.
  """
  gradient = make_gradient(loss, specs, microbatches, watch)

  def train_step(state: TrainState, batch: Batch, learning_rate: jax.Array):
    grads, metrics = gradient(state.params, batch)
    load, dropped = metrics.pop('load', {}), metrics.pop('dropped', {})
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics['loss'])
    trainable, frozen = param.split(state.params, specs)
    head = {'head_norm': metrics['grad_norm/head']} if watch else {}

    def update(trainable, frozen, opt_state):
      updates, new = tx.update(
          grads, opt_state, trainable, learning_rate=learning_rate, use=batch.use, **head)
      params = param.merge(optax.apply_updates(trainable, updates), frozen)
      if load and after_update:
        params = after_update(params, load)
      if isinstance(new, gate.GateState):
        params = jax.tree.map(lambda a, b: jnp.where(new.refused, b, a), params,
                              param.merge(trainable, frozen))
      return params, new

    # A choice between arrays in place of this would hold the whole state twice.
    params, opt_state = jax.lax.cond(
        finite, update, lambda trainable, frozen, old: (param.merge(trainable, frozen), old),
        trainable, frozen, state.opt_state)
    accepted = finite & ~gate.refused(opt_state)
    kept = TrainState(state.updates + accepted, params, opt_state)
    if isinstance(opt_state, gate.GateState):
      metrics |= {'gate/z': opt_state.z, 'gate/refused': opt_state.refused.astype(jnp.float32)}
    metrics |= {'grad_norm': norm, 'nonfinite': (~finite).astype(jnp.float32)}
    metrics |= load_metrics(load) | drop_metrics(load, dropped)
    return kept, metrics

  return train_step


def route_metrics(own: dict[int, jax.Array], batch: Batch) -> dict[str, jax.Array]:
  """How often routers choose otherwise than the sampler did, replayed or not: sums for `means`.

  Of the trained tokens that the sampler read, in every layer.

  Args:
    own: {layer index: [n, T, K]}, what the routers chose.
  """
  out = {'routes/mismatch': jnp.float32(0), 'routes/weight': jnp.float32(0)}
  for layer, taken in batch.routes.items():
    known = batch.masks['train'] * (taken[..., 0] >= 0)
    out['routes/mismatch'] += jnp.sum(known * router.differ(own[layer], taken))
    out['routes/weight'] += jnp.sum(known)
  return out


def load_metrics(load: dict[int, jax.Array]) -> dict[str, jax.Array]:
  """How uneven the experts of all layers are used: the mean over layers, and the worst.

  {layer index: [E]} -> {name: []}.
  """
  layers = [router.load_metrics(one) for one in load.values()]
  together = lambda name: jnp.stack([one[name] for one in layers])
  return {} if not layers else {
      'load/violation': jnp.mean(together('violation')),
      'load/worst_violation': jnp.max(together('violation')),
      'load/idle': jnp.mean(together('idle'))}


def drop_metrics(load: dict[int, jax.Array], dropped: dict[int, jax.Array]) -> dict[str, jax.Array]:
  """How many choices of experts found no room, in all layers together, and their share.

  {layer index: [E]}, {layer index: []} -> {name: []}.
  """
  count, all_rows = (sum(jnp.sum(one).astype(jnp.float32) for one in tree.values())
                     for tree in (dropped, load))
  return {} if not dropped else {
      'load/dropped': count, 'load/dropped_share': count / jnp.maximum(all_rows, 1)}
