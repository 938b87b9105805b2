"""The alignment tax at matched safety."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_ogpsa.evaluation.tax import (
    Point,
    matched_point,
    mean_of_known,
    tax_removed,
    taxes_removed,
)

RUN = [
    Point(40, 1.0, {"nll": 3.0}),
    Point(0, 0.0, {"nll": 1.0}),
    Point(20, 0.5, {"nll": 2.0}),
]


def test_interpolates_between_checkpoints_in_order_of_their_steps():
    point = matched_point(RUN, 0.75)
    assert (point.step, point.safety, point.metrics) == (30, 0.75, {"nll": 2.5})


def test_a_checkpoint_that_matches_exactly_is_taken_as_it_is():
    assert matched_point(RUN, 0.5) == Point(20, 0.5, {"nll": 2.0})


def test_takes_the_first_crossing_of_a_run_that_falls_back():
    run = [*RUN, Point(60, 0.2, {"nll": 9.0}), Point(80, 0.9, {"nll": 9.0})]
    assert matched_point(run, 0.75).step == 30


def test_a_base_model_that_is_safe_enough_needs_no_training():
    assert matched_point(RUN, 0.0).step == 0


def test_a_run_that_never_gets_there_has_no_point():
    assert matched_point(RUN[1:], 0.75) is None
    assert matched_point([], 0.1) is None


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_point_lies_between_its_neighbours(target, middle):
    run = [Point(0, 0.0, {"m": 0.0}), Point(1, middle, {"m": 5.0}), Point(2, 1.0, {"m": 7.0})]
    point = matched_point(run, target)
    assert point.safety == pytest.approx(target)
    assert 0 <= point.step <= 2
    assert 0 <= point.metrics["m"] <= 7


def test_shares_of_the_tax():
    assert tax_removed(1.0, 2.0, 2.0) == 0.0
    assert tax_removed(1.0, 2.0, 1.25) == 0.75
    assert tax_removed(1.0, 2.0, 3.0) == -1.0
    assert tax_removed(1.0, 2.0, 0.5) == 1.0
    assert tax_removed(1.0, 0.9, 1.0) is None
    found = taxes_removed({"a": 0.0, "b": 1.0}, {"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 5.0})
    assert found == {"a": 0.5, "b": None}
    assert mean_of_known(found.values()) == 0.5
    assert mean_of_known([None]) is None
