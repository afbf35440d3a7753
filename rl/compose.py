"""Putting methods together, and what the result needs."""

from nn.types import Want
from rl.types import SAMPLER, SLOTS, Method, Term, label


def compose(*methods: Method) -> Method:
  """Concatenates. Associative, with Method() as its neutral element.

  Raises:
    ValueError: two methods keep a state of the same name.
  """
  state, stages, terms = {}, (), ()
  for m in methods:
    if twice := state.keys() & m.state.keys():
      raise ValueError(f'two methods keep a state named {sorted(twice)}')
    state, stages, terms = {**state, **m.state}, stages + m.stages, terms + m.terms
  return Method(state, stages, terms)


def ready(method: Method) -> Method:
  """Drops what coefficient 0 switches off, sorts stages by slot, then refuses what makes no sense.

  Duplicates are looked for after dropping: a recipe may carry a term with coefficient 0 beside its
  replacement.

  Raises:
    ValueError: names what does not fit: unknown slot, a stage on unknown terms, two stages or terms
      of one name, a term before one it reads, not exactly one estimator for shapers, passes in
      `after`, two requests of one label, a sampler mismatch counted twice.
  """
  if strange := [s.name for s in method.stages if s.slot not in SLOTS]:
    raise ValueError(f'stages {strange} are in no known slot; slots are {SLOTS}')
  known = {t.name for t in method.terms}
  for stage in method.stages:
    if unknown := set(stage.on) - known:
      raise ValueError(f'stage {stage.name!r} weights unknown terms {sorted(unknown)}; '
                       f'terms are {sorted(known)}')
  terms = tuple(t for t in method.terms if callable(t.coef) or t.coef != 0)
  left = {t.name for t in terms}
  stages = (s for s in method.stages if not s.on or left & set(s.on))
  stages = tuple(sorted(stages, key=lambda s: SLOTS.index(s.slot)))
  for what, items in (('stages', stages), ('terms', terms)):
    names = [x.name for x in items]
    if len(set(names)) < len(names):
      raise ValueError(f'two {what} of one name: {names}')
  for i, term in enumerate(terms):
    if missing := set(term.after) - {t.name for t in terms[:i]}:
      raise ValueError(f'term {term.name!r} must come after {sorted(missing)}')
  estimators = [s.name for s in stages if s.slot == 'estimate']
  shapers = [s.name for s in stages if s.slot in ('add', 'multiply', 'clip')]
  if len(estimators) > 1 or (shapers and not estimators):
    raise ValueError(f'one advantage estimator wanted, got {estimators} with shapers {shapers}')
  if late := [s.name for s in stages if s.slot == 'after' and s.needs]:
    raise ValueError(f'stages {late} ask for passes after the update, when its weights are gone')
  method = Method(method.state, stages, terms)
  seen = {}
  for request in requests(method):
    if seen.setdefault(label(request), request) != request:
      raise ValueError(f'two different requests are called {label(request)!r}')
  for term in terms:
    ratios = [s.name for s in stages if s.slot == 'ratio' and term.name in s.on]
    if len(ratios) + (SAMPLER in term.needs) > 1:
      raise ValueError(f'term {term.name!r} would count the sampler mismatch twice: '
                       f'{ratios + ["sampler as old policy"] * (SAMPLER in term.needs)}')
  return method


def requests(method: Method) -> tuple:
  """Every Score and Generate of the method, dependencies first, each once."""
  found = {}

  def visit(request):
    for r in request.needs + (request.context.needs if request.context else ()):
      visit(r)
    found[request] = None

  for consumer in method.stages + method.terms:
    for r in consumer.needs:
      if not isinstance(r, Want):
        visit(r)
  return tuple(found)


def wants(terms: tuple[Term, ...]) -> tuple[Want, ...]:
  """What the terms read off the training forward. Sorted: sets' order differs between processes."""
  return tuple(sorted({n for t in terms for n in t.needs if isinstance(n, Want)}))
