"""The values an RL method is made of: frozen dataclasses, hashable where jit needs it, no pytrees.

N rows of a rollout batch, n rows of one optimiser step, T positions. Everything named Record is
numpy on the host.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from nn.types import LOGP, Batch, Want

SLOTS = (
    'prompts', 'rows', 'reward', 'filter',                      # until enough whole groups are kept
    'estimate', 'add', 'multiply', 'clip', 'ratio', 'weight',   # once, on the whole rollout batch
    'after')                                                    # when its last update is done

value = dataclasses.dataclass(frozen=True)


@value
class Source:
  """Whose weights a pass uses.

  sampler (as recorded), policy (as they are in collect), reference, teacher, average.
  """
  name: str
  rate: float = 0.0                    # average: share of the new weights, once per rollout batch


@value
class Texts:
  """Per row a tuple of parts: strings, which the driver encodes, or token ids, which never are."""
  prefix: tuple
  target: tuple | None = None          # None: the row's own response; results come back as [N, T]


@value
class Context:
  """Which text a pass reads instead of the row as it is."""
  name: str
  build: Callable                      # Record -> Texts
  needs: tuple = ()                    # requests that build reads


@value
class Score:
  """A pass without gradient -> [N, T, ...]; with its own targets [rows, target length, ...]."""
  source: Source
  want: Want
  context: Context | None = None       # None: the rows as they are
  needs: tuple = ()


@value
class Generate:
  """An extra sampling pass -> Samples."""
  source: Source
  context: Context
  max_tokens: int
  temperature: float = 1.0
  needs: tuple = ()


@value
class Samples:
  """What Generate returns: per row, token ids as encoded, sampled ids, their log-probabilities."""
  prefix: tuple
  tokens: tuple
  logp: tuple


POLICY = Source('policy')
SAMPLER, OLD, REFERENCE = (Score(Source(s), LOGP) for s in ('sampler', 'policy', 'reference'))


def label(request: Score | Generate) -> str:
  """The name a request has inside jit and in the derivation of its sampling key."""
  source = request.source.name + (f'{request.source.rate:g}' if request.source.rate else '')
  text = request.context.name if request.context else ''
  if isinstance(request, Generate):
    return f'{source}({text})/{request.max_tokens}'
  return f'{source}({text})/{request.want.kind}{request.want.size or ""}{request.want.ids}'


@value
class Rows:
  """Sampled (or read) rows: prompt, response, then padding."""
  tokens: np.ndarray                   # [N, T] int32
  start: np.ndarray                    # [N] int32, where the response begins
  end: np.ndarray                      # [N] int32, where it ends; not inferred from the padding id
  logp: np.ndarray                     # [N, T] float32, recorded by the sampler; 0 outside response
  group: np.ndarray                    # [N] int64, rows of one prompt share a number
  support: np.ndarray | None = None    # [N, T, S] int32, see nn.types.Batch.support
  routes: dict | None = None           # {layer: [N, T, K] integers}, see nn.types.Batch.routes
  info: dict = dataclasses.field(default_factory=dict)      # {name: [N, ...]}


@value
class Record:
  """One step of an RL run, as the stages see it."""
  step: int
  state: dict                          # {method: nested arrays, numbers, strings}; checkpointed
  # temperature, group, max_tokens, top_k, ...
  sampling: dict = dataclasses.field(default_factory=dict)
  prompts: tuple = ()                  # a dict per group: 'tokens' (ids), fields of the data row
  rows: Rows | None = None
  keep: np.ndarray | None = None       # [N] bool, set by filters, whole groups; None: all
  masks: dict = dataclasses.field(default_factory=dict)     # {name: [N, T] float32}
  reward: dict = dataclasses.field(default_factory=dict)    # {name: [N] float}, NaN: inactive there
  advantage: np.ndarray | None = None  # [N, T] float32
  weight: dict = dataclasses.field(default_factory=dict)    # {term: [N, T] or [N]}; absent: 1
  results: dict = dataclasses.field(default_factory=dict)   # {request: arrays}
  notes: dict = dataclasses.field(default_factory=dict)     # {name: number}: logged


@value
class Stage:
  """A pure numpy function of the record, run in its slot."""
  name: str
  slot: str
  run: Callable[[Record], Record]
  needs: tuple = ()                    # Score, Generate: in record.results before run
  on: tuple = ()                       # names of the terms it weights; dropped when all of them are


@value
class View:
  """What a term's value sees, inside jit. Leaves are arrays."""
  given: dict                          # {Want: of this forward, with gradient; Score: data}
  batch: Batch
  mask: Any                            # [n, T] float32
  done: dict                           # {earlier term: its values, detached}
  sums: dict | None                    # {name: []} over the whole optimiser step, detached


def token_mean(mask: np.ndarray) -> np.ndarray:
  """Weights that give every trained token of the optimiser step the same say: [n, T] -> [n, T]."""
  return mask / max(mask.sum(), 1)


@value
class Term:
  """One summand of the loss: coef * sum(aggregate(mask) * record.weight * value)."""
  name: str
  value: Callable                      # View -> ([n, T] or [n], {metric: same shape})
  needs: tuple                         # Want: of the training forward, with gradient; Score: data
  aggregate: Callable = token_mean     # mask [n, T] of one optimiser step -> weights [n, T] or [n]
  mask: str = 'train'
  coef: float | Callable = 1.0         # or Record -> float
  after: tuple = ()                    # terms whose detached values it reads in view.done
  sums: Callable | None = None         # View -> {name: []}, additive over rows; totals: view.sums


@value
class Method:
  """An RL method, or a piece of one. Composed by `rl.compose.compose`."""
  state: dict = dataclasses.field(default_factory=dict)
  stages: tuple = ()
  terms: tuple = ()
