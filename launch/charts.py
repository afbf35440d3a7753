"""Line charts as SVG for a page: colours are CSS variables, so that they follow light and dark.

--ink, --muted, --grid and --band are the page's; --c0 to --c7 the colours of the lines.
"""

import dataclasses
import html
import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.backends import backend_svg
from matplotlib.figure import Figure

from launch.history import Span

WIDTH, HEIGHT = 4.8, 2.35              # inches of 72 units; the page scales them
POINTS = 400                           # of a drawn line at most; a line between is not visible
NUM_COLORS = 8

# matplotlib wants real colours; these are exchanged for CSS variables in the finished SVG.
NAMES = ('ink', 'muted', 'grid', 'band', *(f'c{i}' for i in range(NUM_COLORS)))
STAND_INS = {name: f'#fe{i:02x}dc' for i, name in enumerate(NAMES)}

STYLE = {
    'svg.fonttype': 'none', 'svg.hashsalt': 'charts', 'font.size': 9.5, 'path.simplify': False,
    'text.color': STAND_INS['muted'], 'axes.labelcolor': STAND_INS['muted'],
    'xtick.color': STAND_INS['muted'], 'ytick.color': STAND_INS['muted'],
    'axes.edgecolor': STAND_INS['grid'], 'grid.color': STAND_INS['grid'],
}


@dataclasses.dataclass(frozen=True)
class Series:
  """One line."""
  steps: np.ndarray                    # [n]
  values: np.ndarray                   # [n] float64; gaps where not finite
  color: int                           # index; colours repeat
  points: bool = False                 # evaluations: marked and not smoothed
  smooth: bool = True


def smoothed(values: np.ndarray) -> np.ndarray:
  """Mean of the neighbours, about a twentieth of the line; gaps stay gaps.

  Three moving means are nearly a Gaussian, and unlike a running mean do not lag behind.
  """
  known = np.isfinite(values)
  total, weight = np.where(known, values, 0.0), known.astype(np.float64)
  for _ in range(3):
    total, weight = (_moving_sum(x, max(1, len(values) // 60)) for x in (total, weight))
  return np.where(known, total / np.maximum(weight, 1), np.nan)


def _moving_sum(x: np.ndarray, reach: int) -> np.ndarray:
  sums = np.concatenate([[0.0], np.cumsum(x)])
  at = np.arange(len(x))
  return sums[np.minimum(at + reach + 1, len(x))] - sums[np.maximum(at - reach, 0)]


def thinned(values: np.ndarray, points: int = POINTS) -> np.ndarray:
  """Indices of the lowest and highest of every stretch, ascending: peaks stay, lines get short."""
  if len(values) <= points:
    return np.arange(len(values))
  kept = {0, len(values) - 1}
  for part in np.array_split(np.arange(len(values)), points // 2):
    kept |= {part[0]} if not np.isfinite(values[part]).any() else {
        part[np.nanargmin(_finite(values[part]))], part[np.nanargmax(_finite(values[part]))]}
  return np.array(sorted(kept))


def draw(title: str, series: Sequence[Series], spans: Sequence[Span] = (),
         marks: Sequence[tuple[int, int]] = (), log: bool = False, percent: bool = False,
         crop: bool = False) -> str:
  """The SVG element of a chart.

  Args:
    spans: shaded and named, if more than one can be seen.
    marks: (step, color) of dotted lines.
    log: logarithmic values, if all are positive.
    percent: values are shares of 1.
    crop: a few values far above all others, as of steps that compile, may leave the chart.
  """
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(WIDTH, HEIGHT), layout='constrained')
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)
    backend_svg.FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for s in series:
      _plot(axes, s, faint=0.28 if len({s.color for s in series}) < 3 else 0.16)
    shown = np.concatenate([s.values[np.isfinite(s.values)] for s in series])
    if log and len(shown) and shown.min() > 0 and shown.max() > 10 * shown.min():
      axes.set_yscale('log')
    else:
      _format(axes, shown, percent)
    if crop and len(shown) >= 20 and shown.max() > 2 * (top := 1.2 * np.quantile(shown, 0.95)) > 0:
      axes.set_ylim(-0.03 * top, top)
    _decorate(axes, series, spans, marks)
    file = io.StringIO()
    figure.savefig(file, format='svg', transparent=True, metadata={
        'Date': None, 'Creator': None, 'Format': None, 'Type': None})
  return _for_page(file.getvalue(), title)


def heatmap(values: np.ndarray, rows: Sequence[str], across: str, down: str, what: str) -> str:
  """A table of small whole numbers as an SVG file of its own.

  Args:
    values: [rows, columns].
    rows: their names.
    across, down, what: what columns, rows and values are.
  """
  with matplotlib.rc_context({'svg.hashsalt': 'charts', 'font.size': 9}):
    figure = Figure(figsize=(6.4, 1.4 + 0.22 * len(rows)), layout='constrained')
    backend_svg.FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect='auto', interpolation='nearest', cmap='viridis')
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    figure.colorbar(image, label=what, ticks=ticker.MaxNLocator(5, integer=True))
    file = io.StringIO()
    figure.savefig(file, format='svg', metadata={'Date': None, 'Creator': None})
  return file.getvalue()


def _plot(axes, s: Series, faint: float) -> None:
  color = STAND_INS[f'c{s.color % NUM_COLORS}']
  if s.points:
    axes.plot(s.steps, s.values, color=color, linewidth=1.6, marker='o', markersize=3.4,
              solid_capstyle='round', zorder=3)
    return
  at = thinned(s.values)
  if not s.smooth or len(s.values) < 10:
    axes.plot(s.steps[at], s.values[at], color=color, linewidth=1.7, zorder=3)
    return
  axes.plot(s.steps[at], s.values[at], color=color, linewidth=0.8, alpha=faint, zorder=2)
  smooth = smoothed(s.values)
  at = np.unique(np.linspace(0, len(smooth) - 1, min(len(smooth), POINTS // 2)).astype(int))
  axes.plot(s.steps[at], smooth[at], color=color, linewidth=1.7, solid_capstyle='round', zorder=3)


def _format(axes, shown: np.ndarray, percent: bool) -> None:
  if percent:
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=' %'))
    if len(shown) and shown.min() >= 0 and shown.max() <= 1:
      top = max(0.01, 1.06 * shown.max())
      axes.set_ylim(-0.03 * top, top)
  elif len(shown) and max(abs(shown.min()), abs(shown.max())) >= 1e4:
    axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _decorate(axes, series: Sequence[Series], spans: Sequence[Span],
              marks: Sequence[tuple[int, int]]) -> None:
  axes.grid(axis='y', linewidth=0.6)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.tick_params(which='both', length=0, pad=4)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  steps = np.concatenate([s.steps for s in series])
  low, high = steps.min(), steps.max()
  margin = 0.02 * (high - low) or 0.5
  axes.set_xlim(low - margin, high + margin)
  for step, color in marks:
    if low < step < high:
      axes.axvline(step, color=STAND_INS[f'c{color % NUM_COLORS}'], linewidth=1, linestyle=':')
  seen = [s for s in spans if s.first < high and s.last > low]
  if len(seen) < 2:
    return
  for i, s in enumerate(seen):
    if i % 2:
      axes.axvspan(max(s.first, low - margin), min(s.last, high + margin),
                   color=STAND_INS['band'], linewidth=0, zorder=0)
    middle = (max(s.first, low) + min(s.last, high)) / 2
    axes.annotate(s.name, (middle, 1), xycoords=('data', 'axes fraction'), xytext=(0, 2),
                  textcoords='offset points', ha='center', va='bottom', fontsize=8.5)


def _for_page(svg: str, title: str) -> str:
  """What a page needs of matplotlib's file: without addresses, fonts, names and needless digits."""
  svg = svg[svg.index('<svg'):]
  head, body = svg.split('>', 1)
  box = re.search(r'viewBox="[^"]*"', head).group()
  body = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>', '', body, flags=re.DOTALL)
  body = re.sub(r'<g id="[^"]*"', '<g', body)
  body = re.sub(r' transform="rotate\(-?0 [^"]*"', '', body)
  body = re.sub(r'font: ([\d.]+px)[^;"]*', r'font-size: \1', body)
  body = re.sub(r'font-family: [^;"]*; ?', '', body)
  body = re.sub(r' (d|x|y|width|height)="[^"]*"', lambda place: re.sub(
      r'\d+\.\d{2,}', lambda number: f'{float(number.group()):.1f}', place.group()), body)
  body = re.sub(r'\s*\n\s*', ' ', body)
  for name, color in STAND_INS.items():
    body = body.replace(color, f'var(--{name})')
  return f'<svg role="img" aria-label="{html.escape(title)}" {box}>{body.strip()}'


def _finite(values: np.ndarray) -> np.ndarray:
  return np.where(np.isfinite(values), values, np.nan)
