"""docs/composability.md says what the tests show."""

from __future__ import annotations

from collections import defaultdict

import pytest

from .composability import OUTCOMES, PAGE, page, rows

pytestmark = pytest.mark.once


def test_the_page_is_that_of_the_tests():
    assert PAGE.read_text() == page(), "run `python tests/composability.py`"


def test_a_feature_has_one_outcome():
    outcomes = defaultdict(set)
    for row in rows():
        outcomes[row.feature].add(row.outcome)
    assert {feature for feature, found in outcomes.items() if len(found) > 1} == set()


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.test}-{row.feature}")
def test_an_outcome_is_one_of_three(row):
    assert row.outcome in OUTCOMES
