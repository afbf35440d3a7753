"""Heads of multi-token prediction in RL: four regimes (arXiv:2605.28184). n rows, T positions.

They differ in what reaches the model that the heads share. Where there are several heads a regime's
loss is their mean, and each head has a coefficient of its own in OCC: our reading, the papers have
one head. Where a segment has not enough tokens before a token for a head to predict it, its loss is
0; the denominator stays that of all trained tokens, as in arXiv:2412.19437, eq. 24.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nn.types import DETACH, LOGP, Want, draft, mtp
from rl import pieces
from rl.names import choose
from rl.types import OLD, POLICY, SAMPLER, Method, Score, Term, View

AVERAGES = {'sums': None, 'ratios': None}


def mtp_detach(mtp_depth: int, coef: float = 0.1) -> Method:
  """The heads learn what is sampled, and the model does not notice."""
  return Method(terms=(likelihood('mtp_detach', mtp_depth, coef, DETACH),))


def mtp_ce(mtp_depth: int, coef: float | Callable = 0.1, detach: tuple[str, ...] = ()) -> Method:
  """The heads learn what is sampled or read, and the model learns with them, whatever the reward.

  detach: some of trunk, embedding, head, which do not.
  """
  return Method(terms=(likelihood('mtp_ce', mtp_depth, coef, detach),))


def mtp_policy(
    mtp_depth: int, max_tokens: int = 0, coef: float = 1.0, old: str = 'main',
    ratio: str = 'token', clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 0.0,
    aggregate: str = 'sequence_mean') -> Method:
  """The policy term with the heads' log-probabilities for the model's, times a fixed coefficient.

  Args:
    old: whose log-probabilities ratios start from: main, the model's in collect; own, the head's
      there, which is a pass; or sampler, the model's as recorded.
    ratio, clip_low, clip_high, dual_clip, aggregate: of `pieces.policy`; to be those of the policy
      term beside it.
  """
  loss = pieces.policy(
      ratio, clip_low, clip_high, dual_clip, aggregate, max_tokens=max_tokens).terms[0]
  heads, _, olds = wanted(mtp_depth, old)

  def value(view):
    return mean(policy_values(view, loss, heads, olds)), {}

  needs = (LOGP, *heads, *map(drafts, heads), *dict.fromkeys(olds))
  return Method(terms=(
      dataclasses.replace(loss, name='mtp_policy', value=value, needs=needs, coef=coef),))


def mtp_occ(
    mtp_depth: int, max_tokens: int = 0, plus: float = 1.0, eps: float = 1e-8, clip: float = 0.0,
    average: str = 'sums', old: str = 'main', train: float = 0.1, ratio: str = 'token',
    clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 0.0,
    aggregate: str = 'sequence_mean') -> Method:
  """Optimal Coefficient Calibration: `mtp_policy` with the coefficient under which it helps most.

  It is estimated anew every step: lambda = plus * c / (v2 + eps), c = <d, e> and v2 = |e|^2 over
  the trained tokens of the optimiser step, d what the log-probabilities of the model have moved by
  since `old`, e those of the head. It may be negative, is 0 on an exactly on-policy step, and
  carries no gradient. The sums are of all rows, and `old` is the model's, as released: our reading.

  Lambda scales what reaches the heads' own parameters, too, which would learn nothing where it is
  0. Hence `mtp_detach` is part of this method: the heads always learn what is sampled, and lambda
  alone decides what the model learns from them. Our reading; the paper trains heads by itself only
  in its regime Detach. It runs the heads, not the model, a second time.

  Args:
    plus, eps: as above.
    clip: lambda is kept within plus and minus this; 0: as it is.
    average: sums, as above; or ratios, the released code's: the mean of d e / (e^2 + eps) over all
      max_tokens of every row, of which those without a token count 0.
    train: coefficient of `mtp_detach`; 0: without it.
    old and the others: as in `mtp_policy`.
  """
  choose(AVERAGES, average, 'average')
  if eps <= 0 or clip < 0 or train < 0:
    raise ValueError(f'eps is {eps}, clip is {clip} and train is {train}, wanted above 0, at least '
                     '0 and at least 0')
  loss = pieces.policy(
      ratio, clip_low, clip_high, dual_clip, aggregate, max_tokens=max_tokens).terms[0]
  heads, main, olds = wanted(mtp_depth, old)

  def sums(view):
    out = {'positions': jnp.float32(view.mask.shape[0] * max_tokens)}
    moved = view.given[LOGP] - view.given[main]
    for head, before in zip(heads, olds):
      mask = view.mask * view.given[drafts(head)][0]
      ahead = view.given[head] - view.given[before]
      out |= {f'c{head.size}': jnp.sum(mask * moved * ahead),
              f'v2{head.size}': jnp.sum(mask * ahead * ahead),
              f'ratios{head.size}': jnp.sum(mask * moved * ahead / (ahead * ahead + eps))}
    return out

  def value(view):
    values, metrics = [], {}
    for head, one in zip(heads, policy_values(view, loss, heads, olds)):
      c, v2, ratios = (view.sums[f'{name}{head.size}'] for name in ('c', 'v2', 'ratios'))
      factor = plus * (c / (v2 + eps) if average == 'sums' else ratios / view.sums['positions'])
      factor = jnp.clip(factor, -clip, clip) if clip else factor
      values.append(factor * one)
      told = {'lambda': factor, 'c': c, 'v2': v2, 'active': abs(factor) > 0.01}
      metrics |= {f'{name}{head.size}': x * jnp.ones_like(view.mask) for name, x in told.items()}
    return mean(values), metrics

  needs = (LOGP, main, *heads, *map(drafts, heads), *(o for o in dict.fromkeys(olds) if o != main))
  return Method(terms=(
      *mtp_detach(mtp_depth, train).terms,
      dataclasses.replace(loss, name='mtp_occ', value=value, needs=needs, sums=sums)))


def measured(method: Method) -> Method:
  """The method with a term mtp beside those that train heads, which tells of them and adds nothing.

  Over the trained tokens: mtp, the mean of the heads' losses in nats; mtp/loss1 that of the first;
  mtp/right1 and mtp/agrees1 how often its draft is the token, and is the model's likeliest.
  """
  heads = {n.size: n for t in method.terms for n in t.needs
           if isinstance(n, Want) and n.kind == 'mtp'}
  if not heads:
    return method

  def value(view):
    losses, metrics = [], {}
    for k, head in sorted(heads.items()):
      losses.append(-jax.lax.stop_gradient(view.given[head]))
      _, right, agrees = view.given[drafts(head)]
      metrics |= {f'loss{k}': losses[-1], f'right{k}': right, f'agrees{k}': agrees}
    return mean(losses), metrics

  needs = (*heads.values(), *map(drafts, heads.values()))
  term = Term('mtp', value, needs, coef=lambda record: 0.0)
  return dataclasses.replace(method, terms=(*method.terms, term))


def wanted(mtp_depth: int, old: str, detach: tuple[str, ...] = ()) -> tuple[tuple, Score, tuple]:
  """What the heads say, what the model said of old, and what is old for each head."""
  if mtp_depth < 1:
    raise ValueError('the model has no heads of multi-token prediction; set model.mtp.depth')
  heads = tuple(mtp(k + 1, detach) for k in range(mtp_depth))
  main = choose({'main': OLD, 'own': OLD, 'sampler': SAMPLER}, old, 'old')
  return heads, main, tuple(Score(POLICY, mtp(h.size)) if old == 'own' else main for h in heads)


def drafts(head: Want) -> Want:
  return draft(head.size, head.detach)


def mean(values: list) -> jax.Array:
  return sum(values) / len(values)


def likelihood(name: str, mtp_depth: int, coef: float | Callable, detach: tuple[str, ...]) -> Term:
  """Minus the heads' mean log-probability of every trained token, in nats."""
  heads, _, _ = wanted(mtp_depth, 'main', detach)
  return Term(name, lambda view: (mean([-view.given[h] for h in heads]), {}), heads, coef=coef)


def policy_values(view: View, loss: Term, heads: tuple, olds: tuple) -> list[jax.Array]:
  """The policy term of every head: [n, T], 0 where it has nothing to predict from."""
  values = []
  for head, old in zip(heads, olds):
    known = view.given[drafts(head)][0]
    seen = dataclasses.replace(
        view, given={LOGP: view.given[head], OLD: view.given[old]}, mask=view.mask * known)
    values.append(jnp.where(known > 0, loss.value(seen)[0], 0))
  return values
