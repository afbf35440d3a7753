"""Charts: what is drawn keeps its peaks, its gaps and its numbers."""

import re

import numpy as np
import pytest

from launch import charts
from launch.charts import Series
from launch.history import Span


def line(values, **options):
  values = np.asarray(values, np.float64)
  return Series(np.arange(len(values)), values, **{'color': 0, **options})


def texts(svg):
  return re.findall(r'<text[^>]*>([^<]*)</text>', svg)


def test_a_mean_of_neighbours_keeps_lines_and_does_not_lag():
  np.testing.assert_allclose(charts.smoothed(np.full(500, 3.0)), 3.0)
  ramp = np.arange(500.0)
  np.testing.assert_allclose(charts.smoothed(ramp)[50:-50], ramp[50:-50])
  noise = np.random.default_rng(0).standard_normal(2000)
  assert charts.smoothed(noise).std() < 0.2 * noise.std()


def test_a_mean_of_neighbours_leaves_gaps_and_is_not_poisoned_by_them():
  values = np.full(300, 2.0)
  values[[0, 100, 101, 299]] = np.nan, np.inf, -np.inf, np.nan
  out = charts.smoothed(values)
  np.testing.assert_array_equal(np.isnan(out), ~np.isfinite(values))
  np.testing.assert_allclose(out[np.isfinite(values)], 2.0)
  np.testing.assert_allclose(charts.smoothed(np.array([5.0])), [5.0])


def test_thinning_keeps_ends_and_peaks():
  values = np.random.default_rng(0).standard_normal(10_000)
  values[[1234, 8765, 4000]] = 50, -50, np.nan
  at = charts.thinned(values, 400)
  assert len(at) <= 402 and (np.diff(at) > 0).all()
  assert {0, 9999, 1234, 8765} <= set(at.tolist())
  np.testing.assert_array_equal(charts.thinned(values[:300], 400), np.arange(300))
  assert len(charts.thinned(np.full(1000, np.nan), 400)) <= 402


def test_colours_are_those_of_the_page():
  spans = [Span('a', 0, 20), Span('b', 20, 50)]
  svg = charts.draw('t', [line(range(50)), line(range(50), color=9)], spans, marks=[(7, 3)])
  for name in ('muted', 'grid', 'band', 'c0', 'c1', 'c3'):       # 9 is 1 again
    assert f'var(--{name})' in svg
  assert not re.search(r'#[0-9a-f]{6}', svg)


def test_nothing_from_outside_and_no_names_that_could_collide():
  svg = charts.draw('a "quoted" <title>', [line([1, 2, 3], points=True)])
  assert 'http' not in svg and 'font-family' not in svg and '<style' not in svg
  assert svg.startswith('<svg role="img" aria-label="a &quot;quoted&quot; &lt;title&gt;" viewBox=')
  used, named = re.findall(r'(?:href="#|url\(#)([^")]*)', svg), re.findall(r' id="([^"]*)"', svg)
  assert used and set(used) <= set(named)


def test_labels_keep_their_digits():
  """Coordinates are rounded, what is written is not."""
  svg = charts.draw('t', [line(np.linspace(0.1201, 0.1251, 40))])
  assert {'0.120', '0.122', '0.124'} <= set(texts(svg))
  assert not re.search(r' d="[^"]*\d\.\d\d', svg)


@pytest.mark.parametrize('spans, shown', [
    ([Span('sft', 0, 40), Span('rl', 40, 99)], ['sft', 'rl']),
    ([Span('sft', -50, 0), Span('rl', 0, 99)], []),              # only one can be seen
    ([], [])])
def test_phases_are_named_where_there_are_several(spans, shown):
  svg = charts.draw('t', [line(range(100))], spans)
  assert [t for t in texts(svg) if t.isalpha()] == shown
  assert ('var(--band)' in svg) == bool(shown)


def test_a_gap_interrupts_the_line():
  whole = charts.draw('t', [line(np.ones(9), smooth=False)])
  broken = charts.draw('t', [line([1, 1, 1, np.nan, 1, 1, 1, 1, 1], smooth=False)])
  moves = lambda svg: [path.count('M') for path in re.findall(r'd="([^"]*)"[^>]*var\(--c0\)', svg)]
  assert moves(whole) == [1] and moves(broken) == [2]


def test_logarithms_only_where_they_exist():
  decades = 10.0 ** np.arange(-7, -1)
  written = lambda values: re.sub('<[^>]*>|\\s', '', charts.draw('t', [line(values)], log=True))
  assert '10−7' in written(decades) and '10−3' in written(decades)
  assert '0.0100' in written([*decades, 0.0])                    # has no logarithm: plain numbers


@pytest.mark.parametrize('spikes, crop, top', [(1, True, 1), (1, False, 50), (20, True, 50)])
def test_a_few_spikes_may_leave_the_chart(spikes, crop, top):
  values = np.ones(100)
  values[:spikes] = 50
  series = Series(10_000 + 100 * np.arange(100), values, 0, smooth=False)
  labels = [t for t in texts(charts.draw('t', [series], crop=crop)) if not t.endswith('k')]
  assert max(map(float, labels)) == pytest.approx(top, rel=0.25)


def test_shares_are_percentages():
  assert '50 %' in texts(charts.draw('t', [line([0.0, 0.5, 1.0], points=True)], percent=True))


@pytest.mark.parametrize('values', [[1.0], [np.nan, 1.0], [5.0] * 40, [1e9, 2e9], [-1e-9, 1e-9]])
def test_any_line_can_be_drawn(values):
  for options in ({}, {'points': True}, {'smooth': False}):
    for log in (False, True):
      svg = charts.draw('t', [line(values, **options)], log=log, percent=not log)
      assert svg.endswith('</svg>')
