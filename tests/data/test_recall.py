"""Associative recall: what a row says, that all answers can be known, that sides share no rows."""

import collections

import numpy as np
import pytest

from data.recall import Recall

OPTIONS = dict(symbols=8, first_id=10, rows=5, seed=0, side='train', length=24)


def test_every_key_is_asked_once_and_answered_with_its_value():
  for index in range(5):
    found = Recall(6, **OPTIONS).example(index, 0)
    shown, asked = found['tokens'].reshape(2, 6, 2)
    assert dict(map(tuple, shown)) == dict(map(tuple, asked)) and len(set(shown[:, 0])) == 6
    assert len(set(shown[:, 1])) == 6, 'values differ'
    assert set(shown[:, 0]) <= set(range(10, 18)) and set(shown[:, 1]) <= set(range(18, 26))
    np.testing.assert_array_equal(found['mask'], [0] * 12 + [0, 1] * 6)


def test_queries_come_in_an_order_of_their_own():
  orders = [Recall(6, **OPTIONS).example(i, 0)['tokens'].reshape(2, 6, 2)[:, :, 0]
            for i in range(5)]
  assert any((shown != asked).any() for shown, asked in orders)


def test_a_row_is_a_function_of_seed_side_index_and_epoch():
  make = lambda index=0, epoch=0, **changes: (
      Recall(6, **OPTIONS | changes).example(index, epoch)['tokens'].tolist())
  assert make() == make()
  assert len({str(x) for x in (
      make(), make(index=1), make(epoch=1), make(seed=1), make(side='heldout'))}) == 5


def test_in_order_are_the_rows_of_the_first_epoch():
  made = Recall(3, **OPTIONS)
  rows = list(made.in_order(collections.Counter()))
  assert len(rows) == len(made) == 5
  np.testing.assert_array_equal(rows[4][0], made.example(4, 0)['tokens'])


@pytest.mark.parametrize('pairs, changes, message', [
    (9, {}, 'recall.pairs has 9, wanted 1 to recall.symbols 8'),
    (0, {}, 'recall.pairs has 0'),
    (6, {'length': 23}, 'makes 24 tokens; rows have 23')])
def test_rows_that_cannot_be_made_are_refused(pairs, changes, message):
  with pytest.raises(ValueError, match=message):
    Recall(pairs, **OPTIONS | changes)
