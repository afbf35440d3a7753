"""Packing: the golden vector, segments and positions, and that nothing is lost."""

import grain
import numpy as np
import pytest

from data import packing


def rows_of(elements, kind, length, bins=2):
  source = grain.MapDataset.source([
      {'tokens': np.array(t, np.int32), 'mask': np.array(m, np.float32)} for t, m in elements])
  return list(packing.pack(source.to_iter_dataset(), kind, length=length, bins=bins, seed=0))


GOLDEN = [([5, 6, 7, 8, 1], [0, 0, 1, 1, 1]), ([9, 10, 1], [0, 1, 1])]


def test_the_golden_vector():
  (row,) = rows_of(GOLDEN, 'fit', 10, bins=1)
  assert row['tokens'].tolist() == [5, 6, 7, 8, 1, 9, 10, 1, 0, 0]
  assert row['segments'].tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 0, 0]
  assert row['positions'].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 0]
  assert row['mask'].tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 0, 0]


def test_split_by_hand():
  rows = rows_of([([5, 6, 7, 8, 1], [1] * 5), ([9, 10, 1], [1] * 3)], 'split', 4)
  assert [r['tokens'].tolist() for r in rows] == [[5, 6, 7, 8], [1, 9, 10, 1]]
  assert [r['segments'].tolist() for r in rows] == [[1, 1, 1, 1], [1, 2, 2, 2]]
  assert [r['positions'].tolist() for r in rows] == [[0, 1, 2, 3], [0, 0, 1, 2]]
  # Never the first of a segment, not even of one that goes on from the row before.
  assert [r['mask'].tolist() for r in rows] == [[0, 1, 1, 1], [0, 0, 1, 1]]


def test_pad_by_hand():
  rows = rows_of(GOLDEN, 'pad', 6)
  assert [r['tokens'].tolist() for r in rows] == [[5, 6, 7, 8, 1, 0], [9, 10, 1, 0, 0, 0]]
  assert [r['segments'].tolist() for r in rows] == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]
  assert [r['mask'].tolist() for r in rows] == [[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize('kind', packing.PACKINGS)
def test_the_batch_invariants(kind):
  rng = np.random.default_rng(0)
  elements = [(rng.integers(1, 99, n), rng.integers(0, 2, n)) for n in rng.integers(1, 16, 60)]
  rows = rows_of(elements, kind, 16, bins=4)
  tokens = [t for r in rows for t in r['tokens'][r['segments'] > 0].tolist()]
  assert sorted(tokens) == sorted(t for e, _ in elements for t in e.tolist())
  for r in rows:
    assert {k: v.dtype for k, v in r.items()} == {
        'tokens': np.int32, 'segments': np.int32, 'positions': np.int32, 'mask': np.float32}
    padding = r['segments'] == 0
    assert not r['mask'][padding].any() and not r['tokens'][padding].any()
    assert (np.diff(padding.astype(int)) >= 0).all()                # at the end only
    begins = np.diff(r['segments'], prepend=0) != 0
    assert (r['positions'][~padding] == 0).tolist() == begins[~padding].tolist()
    steps = np.diff(r['positions'])[~begins[1:] & ~padding[1:]]
    assert (steps == 1).all()
    assert not r['mask'][r['positions'] == 0].any()


def test_first_fit_keeps_rows_whole_and_their_masks():
  rows = rows_of(GOLDEN * 5, 'fit', 10)
  segments = [(r['tokens'][r['segments'] == s].tolist(), r['mask'][r['segments'] == s].tolist())
              for r in rows for s in range(1, r['segments'].max() + 1)]
  assert sorted(segments) == sorted(GOLDEN * 5)


def test_windows_overlap_by_one_within_a_text():
  texts = [(np.arange(5), np.ones(5), True), (np.arange(5, 8), np.ones(3), False),
           (np.arange(50, 53), np.ones(3), True), (np.array([7]), np.ones(1), True)]
  cut = [t.tolist() for t, _ in packing.windows(texts, 4)]
  assert cut == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7], [50, 51, 52]]


def test_pieces_fill_rows_in_order():
  pieces = [(np.full(n, n), np.ones(n)) for n in (2, 2, 3, 4, 1)]
  rows = list(packing.in_order(pieces, 4))
  assert [r['tokens'].tolist() for r in rows] == [
      [2, 2, 2, 2], [3, 3, 3, 0], [4, 4, 4, 4], [1, 0, 0, 0]]
  assert [r['segments'].tolist() for r in rows] == [
      [1, 1, 2, 2], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
  assert [r['positions'].tolist() for r in rows[:2]] == [[0, 1, 0, 1], [0, 1, 2, 0]]
  assert [r['mask'].tolist() for r in rows[:2]] == [[0, 1, 0, 1], [0, 1, 1, 0]]


def test_an_unknown_packing_is_named():
  with pytest.raises(ValueError, match="packing is 'best'"):
    rows_of(GOLDEN, 'best', 4)
