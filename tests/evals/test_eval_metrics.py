"""Metrics against cases worked out by hand."""

import math

import numpy as np
import pytest

from evals import metrics


@pytest.mark.parametrize('target, output, right', [
    ('Paris', 'Paris', 1), ('Paris', '  Paris\n', 1), ('New York', 'New\n  York', 1),
    ('Paris', 'paris', 0), ('Paris', 'Paris.', 0), ('NewYork', 'New York', 0), ('', '', 1),
])
def test_exact_match_looks_past_white_space_only(target, output, right):
  assert metrics.exact_match(target, output) == right


def test_maths_by_hand():
  targets = ['So 6 * 7 = 42\n#### 42', '\\frac{1}{2}', '3', '7', '']
  outputs = ['I think it is $42$.', 'It is \\boxed{0.5}', '#### 4', '', '7']
  scores, report = metrics.maths(targets, outputs)
  np.testing.assert_array_equal(scores, [1, 1, 0, 0, 0])
  assert report['errors'] == 1 and 'no mathematical answer' in report['first_error']


@pytest.mark.parametrize('logp, tokens, raw, normalised', [
    ([-3.0, -2.0, -4.0], [1, 1, 1], 1, 1),
    ([-3.0, -2.0, -4.0], [3, 1, 8], 1, 2),     # per token: -1, -2, -1/2
    ([-2.0, -2.0], [1, 1], 0, 0),              # the first of equals
])
def test_the_likeliest_choice_by_hand(logp, tokens, raw, normalised):
  assert metrics.likeliest(logp, tokens) == (raw, normalised)


@pytest.mark.parametrize('output, index', [
    ('B', 1), ('B. Paris', 1), ('(C)', 2), ('Answer: B', 1), ('The answer is (C).', 2),
    ('A fine question. The answer is B.', 1), ('answer is A. No: the answer is C', 2),
    ('E', None), ('E or B', 1), ('because', None), ('', None), ('Berlin', None),
])
def test_the_letter_that_an_output_names(output, index):
  assert metrics.letter(output, 4) == index


def test_perplexity_and_bits_by_hand():
  # Four tokens of probability 1/8 each.
  assert metrics.perplexity(4 * math.log(1 / 8), 4) == pytest.approx(8)
  assert metrics.bits_per_byte(4 * math.log(1 / 8), 6) == pytest.approx(2)
  assert metrics.perplexity(-1e6, 1) == math.inf
