"""The pieces methods share: estimators, reward shaping, filters, terms and weighters.

N rows, T positions. Every piece is a function that returns a Method; its options are plain values,
so that a config can name them.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from nn.types import ENTROPY, LOGP
from rl import losses
from rl.names import choose
from rl.types import OLD, REFERENCE, SAMPLER, Method, Record, Stage, Term

replace = dataclasses.replace

# Rewards of a group that differ by less than this share of the largest are equal but for rounding.
SAME_REWARD = 1e-9
OLD_POLICIES = {'policy': OLD, 'sampler': SAMPLER}


def group_mean(x: np.ndarray, group: np.ndarray) -> np.ndarray:
  """Mean of x over the rows of its group, at every row: [N], [N] -> [N] float64."""
  _, index = np.unique(group, return_inverse=True)
  return (np.bincount(index, x) / np.bincount(index))[index]


def group_size(group: np.ndarray) -> np.ndarray:
  """Rows of each row's group: [N] -> [N]."""
  _, index, count = np.unique(group, return_inverse=True, return_counts=True)
  return count[index]


def differs(reward: np.ndarray, group: np.ndarray) -> np.ndarray:
  """Whether the rewards of a row's group are not all the same: [N], [N] -> [N] bool."""
  names, index = np.unique(group, return_inverse=True)
  low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
  np.minimum.at(low, index, reward)
  np.maximum.at(high, index, reward)
  return (high - low > SAME_REWARD * np.maximum(np.abs(low), np.abs(high)))[index]


def total(record: Record, ignore: tuple[str, ...] = ()) -> np.ndarray:
  """Sum of every row's reward components, [N] float64. NaN (not active for it) adds nothing."""
  parts = [np.asarray(r, np.float64) for name, r in record.reward.items() if name not in ignore]
  if not parts:
    raise ValueError(f'no reward to learn from: there are {sorted(record.reward)}, '
                     f'and {sorted(ignore)} do not count')
  return np.nansum(np.stack(parts), axis=0)


def above_group(record: Record) -> np.ndarray:
  """Total reward minus its group's mean, [N] float64; exactly 0 where all are equal.

  A row that is its whole group has no baseline.
  """
  reward, group = total(record), record.rows.group
  above = np.where(differs(reward, group), reward - group_mean(reward, group), 0.0)
  return np.where(group_size(group) == 1, reward, above)


def spread(record: Record, per_row: np.ndarray) -> Record:
  """Gives trained tokens their row's advantage [N]. Notes the share of groups that teach."""
  advantage = (per_row[:, None] * record.masks['train']).astype(np.float32)
  _, index = np.unique(record.rows.group, return_inverse=True)
  teaches = np.bincount(index, advantage.any(axis=1)) > 0
  trained = np.bincount(index, record.masks['train'].any(axis=1)) > 0
  share = float(teaches.sum() / max(trained.sum(), 1))
  return replace(record, advantage=advantage, notes=record.notes | {'groups_with_signal': share})


def group_advantage(eps: float = 1e-4) -> Method:
  """GRPO's estimator (arXiv:2402.03300): above the group's mean, in standard deviations.

  The deviation is the unbiased one, 1 for a lone row; eps is added to it.
  """
  def run(record):
    above, size = above_group(record), group_size(record.rows.group)
    square = group_mean(above * above, record.rows.group) * size / np.maximum(size - 1, 1)
    alike = (size == 1) | (square == 0)
    return spread(record, above / (np.where(alike, 1.0, np.sqrt(square)) + eps))
  if eps < 0:
    raise ValueError(f'eps is {eps}, wanted at least 0')
  return Method(stages=(Stage('group_advantage', 'estimate', run),))


def centred_advantage() -> Method:
  """Dr. GRPO's estimator (arXiv:2503.20783): above the group's mean."""
  def run(record):
    return spread(record, above_group(record))
  return Method(stages=(Stage('centred_advantage', 'estimate', run),))


def leave_one_out() -> Method:
  """RLOO's estimator (arXiv:2402.14740): above the mean of the other rows of the group."""
  def run(record):
    size = group_size(record.rows.group)
    return spread(record, above_group(record) * size / np.maximum(size - 1, 1))
  return Method(stages=(Stage('leave_one_out', 'estimate', run),))


def overlong(max_tokens: int, share: float = 0.2, factor: float = 1.0) -> Method:
  """DAPO's soft length penalty (arXiv:2503.14476, eq. 13), a reward component of its own.

  Args:
    max_tokens: trained tokens at which the penalty is whole.
    share: of max_tokens, the last stretch, over which it grows linearly from 0.
    factor: the whole penalty; 0: none.
  """
  if not 0 < share <= 1:
    raise ValueError(f'share is {share}, wanted above 0 and at most 1')
  if max_tokens < 1:
    raise ValueError(f'max_tokens is {max_tokens}, wanted at least 1')
  if factor == 0:
    return Method()

  def run(record):
    stretch = share * max_tokens
    excess = record.masks['train'].sum(axis=1) - (max_tokens - stretch)
    penalty = -factor * np.clip(excess / stretch, 0.0, 1.0)
    return replace(record, reward=record.reward | {'overlong': penalty})

  return Method(stages=(Stage('overlong', 'reward', run),))


def shuffled_rewards(seed: int = 0) -> Method:
  """A control experiment: every row gets the rewards of a row drawn without replacement.

  All components of a row move together, so that their distribution stays as it is and only what
  they say about the row is lost. A run that still improves learns from something else. To be
  listed behind other pieces of the reward slot, whose components it then moves, too; what is
  logged and shown is what the row was given.

  seed: the permutation is drawn by it and the step.
  """
  def run(record):
    order = np.random.default_rng([seed, record.step]).permutation(len(record.rows.start))
    return replace(record, reward={name: r[order] for name, r in record.reward.items()})
  if seed < 0:
    raise ValueError(f'seed is {seed}, wanted at least 0')
  return Method(stages=(Stage('shuffled_rewards', 'reward', run),))


def mixed_groups(ignore: tuple[str, ...] = ('overlong',)) -> Method:
  """DAPO's dynamic sampling (arXiv:2503.14476): keeps groups whose rewards are not all the same.

  ignore: components that do not count: a length penalty alone makes no group worth keeping.
  """
  def run(record):
    mixed = differs(total(record, ignore), record.rows.group)
    return replace(record, keep=mixed if record.keep is None else record.keep & mixed)
  return Method(stages=(Stage('mixed_groups', 'filter', run),))


def aggregate_named(name: str, max_tokens: int) -> Callable:
  """mask -> weights, by name; 'constant' divides every row's sum by max_tokens."""
  if name != 'constant':
    return choose({**losses.AGGREGATES, 'constant': None}, name, 'aggregate')
  if max_tokens < 1:
    raise ValueError(f"aggregate 'constant' divides by max_tokens, which is {max_tokens}")
  return losses.constant(max_tokens)


def policy(ratio: str = 'token', clip_low: float = 0.2, clip_high: float = 0.2,
           dual_clip: float = 0.0, aggregate: str = 'sequence_mean', old: str = 'policy',
           coef: float = 1.0, max_tokens: int = 0) -> Method:
  """The clipped policy term, `rl.losses.clipped_policy_loss`.

  Args:
    ratio: token, or sequence for GSPO's.
    aggregate: token_mean, sequence_mean, sequence_sum or constant, which divides by max_tokens.
    old: whose log-probabilities the ratio starts from: policy, the weights as they are in collect,
      or sampler, as recorded, which saves a pass and already contains the sampler mismatch.
  """
  if not (0 < clip_low <= 1 and clip_high > 0):
    raise ValueError(f'wanted 0 < clip_low <= 1 and clip_high > 0, got {clip_low} and {clip_high}')
  if dual_clip and dual_clip <= 1 + clip_high:
    raise ValueError(f'dual_clip is {dual_clip}, wanted 0 or above 1 + clip_high = {1 + clip_high}')
  log_ratio = choose(losses.RATIOS, ratio, 'ratio')
  old_logp = choose(OLD_POLICIES, old, 'old policy')

  def value(view):
    if view.batch.advantage is None:
      raise ValueError('the policy term needs an advantage: name an estimator like group_advantage')
    return losses.clipped_policy_loss(
        log_ratio(view.given[LOGP], view.given[old_logp], view.mask), view.batch.advantage,
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)

  weights = aggregate_named(aggregate, max_tokens)
  return Method(terms=(Term('policy', value, (LOGP, old_logp), weights, coef=coef),))


def kl(estimator: str = 'k3', coef: float = 0.04, aggregate: str = 'sequence_mean',
       max_tokens: int = 0) -> Method:
  """Keeps the policy near the reference.

  estimator: k1, k2, k3, or k3_k2, which is k3's value with k2's gradient; see `rl.losses`.
  """
  divergence = choose(losses.KL, estimator, 'estimator')

  def value(view):
    return divergence(view.given[LOGP], view.given[REFERENCE]), {}

  weights = aggregate_named(aggregate, max_tokens)
  return Method(terms=(Term('kl', value, (LOGP, REFERENCE), weights, coef=coef),))


def entropy(coef: float = 0.001, aggregate: str = 'token_mean', max_tokens: int = 0) -> Method:
  """Rewards an undecided policy: the term is minus the entropy at every token, in nats."""
  def value(view):
    return -view.given[ENTROPY], {}
  weights = aggregate_named(aggregate, max_tokens)
  return Method(terms=(Term('entropy', value, (ENTROPY,), weights, coef=coef),))


def sft(mask: str = 'train', coef: float = 1.0, aggregate: str = 'token_mean',
        max_tokens: int = 0) -> Method:
  """Maximum likelihood: minus the log-probability of every token in the mask, in nats."""
  def value(view):
    return -view.given[LOGP], {}
  weights = aggregate_named(aggregate, max_tokens)
  return Method(terms=(Term('nll', value, (LOGP,), weights, mask, coef),))


def token_mismatch(record: Record) -> np.ndarray:
  """log(old / sampler) of every trained token, 0 elsewhere: [N, T]."""
  gap = record.results[OLD] - record.results[SAMPLER]
  return np.where(record.masks['train'] > 0, gap, 0.0)


def sequence_mismatch(record: Record) -> np.ndarray:
  """log(old / sampler) of the row's trained tokens together, at every position: [N, T]."""
  gap = token_mismatch(record)
  return np.broadcast_to(gap.sum(axis=1, keepdims=True), gap.shape)


LEVELS = {'token': token_mismatch, 'sequence': sequence_mismatch}


def weigh(record: Record, on: tuple[str, ...], factor: np.ndarray) -> Record:
  """Multiplies the weights of the terms in `on` by factor [N, T]."""
  def product(term):
    before = record.weight.get(term)
    return factor if before is None else factor * (before[:, None] if before.ndim == 1 else before)
  return replace(record, weight=record.weight | {term: product(term) for term in on})


def mismatch(name: str, level: str, on: tuple[str, ...], coefficient: Callable) -> Method:
  """Weights old / sampler, as `coefficient` limits them; notes the share of tokens it limits."""
  log_ratio = choose(LEVELS, level, 'level')

  def run(record):
    bounded = np.clip(log_ratio(record), -losses.MAX_LOG_RATIO, losses.MAX_LOG_RATIO)
    ratio = np.exp(bounded).astype(np.float32)
    limited = coefficient(ratio).astype(np.float32)
    trained = record.masks['train'] > 0
    share = float((trained & (limited != ratio)).sum() / max(trained.sum(), 1))
    return replace(weigh(record, on, limited), notes=record.notes | {f'{name}_limited': share})

  return Method(stages=(Stage(name, 'ratio', run, (OLD, SAMPLER), on),))


def tis(cap: float = 2.0, level: str = 'token', on: tuple[str, ...] = ('policy',)) -> Method:
  """Truncated importance sampling: a ratio above cap counts as cap.

  level: token, or sequence, whose ratio is the product.
  """
  if cap <= 0:
    raise ValueError(f'cap is {cap}, wanted above 0')
  return mismatch('tis', level, on, lambda ratio: np.minimum(ratio, cap))


def mis(cap: float = 2.0, level: str = 'token', on: tuple[str, ...] = ('policy',)) -> Method:
  """Masked importance sampling: a ratio above cap counts as 0.

  level: token, or sequence, whose ratio is the product.
  """
  if cap <= 0:
    raise ValueError(f'cap is {cap}, wanted above 0')
  return mismatch('mis', level, on, lambda ratio: np.where(ratio <= cap, ratio, 0.0))


def icepop(low: float = 0.5, high: float = 5.0, on: tuple[str, ...] = ('policy',)) -> Method:
  """IcePop: a token's ratio outside [low, high] counts as 0."""
  if not 0 <= low < high:
    raise ValueError(f'low is {low}, high is {high}; wanted 0 <= low < high')
  inside = lambda ratio: (ratio >= low) & (ratio <= high)
  return mismatch('icepop', 'token', on, lambda ratio: np.where(inside(ratio), ratio, 0.0))


def geometric(low: float = 0.999, high: float = 1.001, on: tuple[str, ...] = ('policy',)) -> Method:
  """Drops rows whose geometric mean of old / sampler is outside [low, high].

  Not in the ratio slot: it multiplies by no ratio, so it may stand beside TIS.
  """
  if not 0 <= low < high:
    raise ValueError(f'low is {low}, high is {high}; wanted 0 <= low < high')

  def run(record):
    length = np.maximum(record.masks['train'].sum(axis=1, keepdims=True), 1)
    mean = np.exp(token_mismatch(record).sum(axis=1, keepdims=True) / length)
    inside = (mean >= low) & (mean <= high)
    factor = np.broadcast_to(inside, record.masks['train'].shape).astype(np.float32)
    notes = record.notes | {'geometric_kept': float(inside.mean())}
    return replace(weigh(record, on, factor), notes=notes)

  return Method(stages=(Stage('geometric', 'weight', run, (OLD, SAMPLER), on),))
