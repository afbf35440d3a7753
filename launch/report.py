"""Writes one HTML page about one or several runs: `python launch/report.py runs/a runs/b`.

The page needs nothing but itself: no scripts, no addresses. It reads metrics.jsonl, samples.jsonl,
warnings.jsonl and config.json of each workdir, and needs no jax.
"""

import dataclasses
import fnmatch
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import charts, cli, history, metrics, page  # noqa: E402
from launch.history import Run  # noqa: E402

SAMPLED_STEPS = 6                      # of a run that are shown with samples


@dataclasses.dataclass(frozen=True)
class Chart:
  """What is drawn together. patterns: of metric names, as in file names."""
  section: str
  title: str
  patterns: tuple[str, ...]
  log: bool = False
  percent: bool = False
  smooth: bool = True
  crop: bool = False


CHARTS = (
    Chart('Learning', 'Held-out accuracy', ('eval/accuracy', 'eval/pass@*', 'eval/mean@*'),
          percent=True),
    Chart('Learning', 'Reward', ('reward',)),
    Chart('Learning', 'Reward components', ('reward/*',)),
    Chart('Learning', 'Loss', ('loss', 'eval/loss')),
    Chart('Policy', 'Entropy', ('entropy',)),
    Chart('Policy', 'KL', ('kl', 'kl/*', '*/kl', '*/kl_*')),
    Chart('Policy', 'Response length', ('response_length', 'eval/response_length')),
    Chart('Policy', 'Cut off at the limit', ('truncated', 'eval/truncated'), percent=True),
    Chart('Policy', 'Clip fraction', ('clip_fraction', '*/clip_fraction'), percent=True),
    Chart('Policy', 'Groups with a signal', ('groups_with_signal',), percent=True),
    Chart('Policy', 'Sampler against trainer', ('parity', 'parity/*'), log=True),
    Chart('Optimiser', 'Gradient norm', ('grad_norm', 'grad_norm/*'), log=True),
    Chart('Optimiser', 'Gate on reuse', ('gate/updates', 'gate/z')),
    Chart('Optimiser', 'Policy shift, chi-square', ('shift/chi2', 'shift/bound'), log=True),
    Chart('Optimiser', 'Weight change since the phase began', ('drift/*',), percent=True),
    Chart('Optimiser', 'Learning rate', ('learning_rate',), smooth=False),
    Chart('Speed', 'Tokens per second', ('tokens_per_second',)),
    Chart('Speed', 'Model FLOP utilisation', ('mfu',), percent=True),
    Chart('Speed', 'Seconds', ('seconds', 'time/*'), crop=True),
)


def build(workdirs: Sequence[str | Path], output: str | Path | None = None) -> Path:
  """Writes the page; returns where. Default: report.html in the only workdir, or else here.

  Raises:
    ValueError: a folder that is no workdir, or one without a logged step.
  """
  runs = history.load(workdirs)
  if output is None:
    output = runs[0].folder / 'report.html' if len(runs) == 1 else 'report.html'
  path = Path(output)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(compose(runs), encoding='utf-8', errors='backslashreplace')
  return path


def before_after(workdirs: Sequence[str | Path]) -> str:
  """The table of evaluations, first, last and best, for the console."""
  header, *rows = comparison(history.load(workdirs))
  table = [header, *rows]
  widths = [max(len(row[i]) for row in table) for i in range(len(header))]
  line = lambda row: '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
  return '\n'.join([line(header), '-' * len(line(header)), *map(line, rows)])


def direction(metric: str) -> int:
  """1: more is better, -1: less is better, 0: neither."""
  if re.search(r'loss|perplexity|error|timeouts|truncated|kl$', metric):
    return -1
  return 1 if re.search(r'accuracy|reward|pass@|mean@|exact|score|signal', metric) else 0


def comparison(runs: Sequence[Run]) -> list[list[str]]:
  """A header and rows of text: every number of an evaluation, by phase: first, last and best.

  Without any evaluation, of reward and loss, smoothed.
  """
  found: dict[tuple[str, str], dict[str, list[str]]] = {}
  order = [span.name for run in runs for span in run.phases]
  for run in runs:
    names = [n for n in run.values if n.startswith('eval/') and n not in metrics.SIZES]
    for name in names or [n for n in ('reward', 'loss') if n in run.values]:
      for phase in dict.fromkeys(run.values[name][2]):
        if row := _first_last_best(run, name, phase):
          found.setdefault((phase, row[0]), {})[run.name] = row[1:]
  place = lambda phase: order.index(phase) if phase in order else -1
  keys = sorted(found, key=lambda key: (place(key[0]), -direction(key[1]), key[1]))
  if len(runs) == 1:
    rows = [[*key, *found[key][runs[0].name]] for key in keys]
    header = ['phase', 'number', 'first', 'last', 'best']
  else:
    rows = [[*key, *(_change(found[key].get(run.name)) for run in runs)] for key in keys]
    header = ['phase', 'number', *(run.name for run in runs)]
  unnamed = not any(phase for phase, _ in keys)
  return [row[1:] if unnamed else row for row in [header, *rows]]


def _first_last_best(run: Run, name: str, phase: str) -> list[str] | None:
  """Name, first, last and best, each with its step; None if there is no finite value."""
  steps, values, phases = run.values[name]
  here = np.array([p == phase for p in phases]) & np.isfinite(values)
  if not here.any():
    return None
  steps, values = steps[here], values[here]
  if not name.startswith('eval/'):
    values, name = charts.smoothed(values), f'{name} (smoothed)'
  show = lambda i: f'{values[i]:.4g} @{steps[i]}'
  best = show(int(np.argmax(direction(name) * values))) if direction(name) else ''
  return [name, show(0), show(-1), best]


def _change(row: list[str] | None) -> str:
  if row is None:
    return '–'
  first, last, best = row
  more = f', best {best}' if best and best != last else ''
  return f'{first.split(" @")[0]} → {last.split(" @")[0]}{more}'


def picked_samples(run: Run) -> list[tuple[int, list[tuple[str, dict]]]]:
  """[(step, [('worst' or 'best', sample)])] of some steps from first to last."""
  steps = sorted({sample['step'] for sample in run.samples})
  if len(steps) > SAMPLED_STEPS:
    steps = [steps[i] for i in np.linspace(0, len(steps) - 1, SAMPLED_STEPS).round().astype(int)]
  found = []
  for step in steps:
    samples = [s for s in run.samples if s['step'] == step]
    ranked = sorted((s for s in samples if _reward(s) > -math.inf), key=_reward)
    if len(ranked) > 1:
      found.append((step, [('best', ranked[-1]), ('worst', ranked[0])]))
    else:
      found.append((step, [('', s) for s in samples[:2]]))
  return found


def _reward(sample: dict) -> float:
  try:
    return float(sample.get('reward', math.nan))
  except (TypeError, ValueError):
    return math.nan


def flat(config: Any, path: str = '') -> dict[str, Any]:
  """{'a.b': value}."""
  if isinstance(config, dict) and config:
    return {k: v for key, value in config.items() for k, v in flat(value, f'{path}.{key}').items()}
  return {path[1:]: config}


def differences(runs: Sequence[Run]) -> list[list[str]]:
  """A header and rows: the settings in which the runs differ; [] if there are none."""
  configs = [flat(run.config) if run.config else {} for run in runs]
  show = lambda c, key: json.dumps(c[key]) if key in c else '–'
  keys = sorted({key for c in configs for key in c})
  rows = [[key, *(show(c, key) for c in configs)] for key in keys]
  rows = [row for row in rows if len(set(row[1:])) > 1]
  return [['setting', *(run.name for run in runs)], *rows] if rows else []


def groups(runs: Sequence[Run]) -> list[tuple[Chart, list[str]]]:
  """Charts and their metrics, in the order of the page.

  Every metric is in exactly one, but for those that are constant and of no known kind.
  """
  left = dict.fromkeys(name for run in runs for name, (_, values, _) in run.values.items()
                       if np.isfinite(values).any())
  found = []
  for chart in CHARTS:
    names = list(dict.fromkeys(n for pattern in chart.patterns for n in sorted(left)
                               if fnmatch.fnmatchcase(n, pattern)))
    for name in names:
      del left[name]
    if names and len(runs) > 1:        # colours are for runs then
      found += [(dataclasses.replace(chart, title=chart.title if len(names) == 1 else name), [name])
                for name in names]
    elif names:
      found.append((chart, names))
  return found + [(Chart('Other', name, (name,)), [name])
                  for name in sorted(left) if constant(runs, name) is None]


def unchanged(runs: Sequence[Run]) -> list[list[str]]:
  """(name, value) of the metrics that `groups` leaves out."""
  drawn = {name for _, names in groups(runs) for name in names}
  rest = sorted({name for run in runs for name in run.values} - drawn)
  return [[name, f'{constant(runs, name):g}'] for name in rest if constant(runs, name) is not None]


def constant(runs: Sequence[Run], name: str) -> float | None:
  """The value of a metric that never was another; such a metric is written, not drawn."""
  values = {v for run in runs if name in run.values for v in run.values[name][1].tolist()}
  return values.pop() if len(values) == 1 else None


def compose(runs: Sequence[Run]) -> str:
  """The page."""
  drawn: dict[str, list[str]] = {}
  spans, marks = shared_phases(runs)
  marks = marks + [(run.grown, i) for i, run in enumerate(runs) if run.grown]
  for chart, names in groups(runs):
    series = [s for i, run in enumerate(runs) for j, name in enumerate(names)
              for s in pieces(run, name, i if len(runs) > 1 else j,
                              chart.smooth and not re.search(history.COUNTS, name))]
    svg = charts.draw(chart.title, series, spans, marks, chart.log, chart.percent, chart.crop)
    legend = list(zip(names, range(len(names)))) if len(runs) == 1 and len(names) > 1 else []
    drawn.setdefault(chart.section, []).append(page.figure(chart.title, svg, legend))
  parts = [page.heading(runs[0].name if len(runs) == 1 else f'{len(runs)} runs', facts(runs))]
  if len(runs) > 1:
    parts.append(page.legend([(run.name, i) for i, run in enumerate(runs)], 'runs'))
  else:
    parts.append(page.cards(cards(runs[0])))
  if len(table := comparison(runs)) > 1:
    parts.append(page.section('Before and after', page.table(table)))
  if rows := differences(runs):
    parts.append(page.section('Settings that differ', page.table(rows)))
  for run in runs:
    if run.warnings:
      parts.append(page.warnings(run.name if len(runs) > 1 else '', run.warnings))
  parts += [page.section(name, page.grid(figures)) for name, figures in drawn.items()]
  if still := unchanged(runs):
    parts.append(page.section('Never changed', page.table([['number', 'value'], *still])))
  for run in runs:
    if run.samples and len(runs) == 1:
      parts.append(page.section('Samples', page.samples(picked_samples(run))))
    elif run.samples:
      parts.append(page.details(f'Samples of {run.name}', page.samples(picked_samples(run))))
  for run in runs:
    if run.config:
      title = 'Resolved config' if len(runs) == 1 else f'Resolved config of {run.name}'
      parts.append(page.details(title, page.text(json.dumps(run.config, indent=2))))
  return page.document(' and '.join(run.name for run in runs), parts)


def shared_phases(runs: Sequence[Run]) -> tuple[list[history.Span], list[tuple[int, int]]]:
  """Phases to shade if they begin alike in all runs; or else (step, color) where they begin."""
  begins = [[(span.name, span.first) for span in run.phases] for run in runs]
  longest = max(runs, key=lambda run: (len(run.phases), run.lines[-1]['step'])).phases
  if all(b == [(s.name, s.first) for s in longest][:len(b)] for b in begins):
    return longest, []
  return [], [(first, i) for i, begin in enumerate(begins) for _, first in begin]


def pieces(run: Run, name: str, color: int, smooth: bool) -> list[charts.Series]:
  """A metric's line, interrupted where the phase changes."""
  if name not in run.values:
    return []
  steps, values, phases = run.values[name]
  starts = [i for i in range(len(phases)) if i == 0 or phases[i] != phases[i - 1]]
  return [charts.Series(steps[a:b], values[a:b], color, name.startswith('eval/'), smooth)
          for a, b in zip(starts, [*starts[1:], len(phases)])]


def facts(runs: Sequence[Run]) -> list[str]:
  """One line of facts about each run."""
  found = []
  for run in runs:
    seconds = run.lines[-1].get('time', 0) - run.lines[0].get('time', 0)
    phases = ' → '.join(f'{s.name} to step {s.last}' for s in run.phases)
    grown = [f'experts grown at step {run.grown} (dotted)'] if run.grown else []
    text = [phases or f'{run.lines[-1]["step"]} steps', *grown,
            f'{metrics.duration(seconds)} of log']
    found.append(' · '.join([run.name] * (len(runs) > 1) + text))
  return found


def cards(run: Run) -> list[tuple[str, str, str]]:
  """(name, number, remark) of what matters most in a single run."""
  found = []
  share = lambda name: re.search('accuracy|mfu', name)
  number = lambda name, value: f'{value:.1%}' if share(name) else f'{value:.4g}'
  for name, title in (('eval/accuracy', 'Held-out accuracy'), ('reward', 'Reward'),
                      ('eval/loss', 'Held-out loss'), ('loss', 'Loss')):
    if name not in run.values or (name == 'loss' and found):
      continue
    _, values, phases = run.values[name]
    here = values[np.isfinite(values) & np.array([p == phases[-1] for p in phases])]
    if not len(here):
      continue
    here = here if name.startswith('eval/') else charts.smoothed(here)
    phase = f' in {phases[-1]}' if phases[-1] else ''
    found.append((title, number(name, here[-1]), f'from {number(name, here[0])}{phase}'))
  for name, title in (('tokens_per_second', 'Tokens per second'), ('mfu', 'MFU')):
    if name in run.values and np.isfinite(run.values[name][1]).any():
      middle = float(np.nanmedian(run.values[name][1]))
      shown = metrics.short(middle) if name != 'mfu' else number(name, middle)
      found.append((title, shown, 'median step'))
  return found


def main(arguments: list[str]) -> None:
  parser = cli.parser(__doc__)
  parser.add_argument('workdirs', nargs='+', help='folders of runs')
  parser.add_argument('--output', default=None, help='where to write the page')
  options = parser.parse_args(arguments)
  print(f'report: {build(options.workdirs, options.output)}')


if __name__ == '__main__':
  cli.run(main)
