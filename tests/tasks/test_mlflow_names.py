"""What MLflow itself accepts is the reference."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import (
    MAX_ENTITY_KEY_LENGTH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
    _validate_metric_name,
)

from tasks.tracking.mlflow_names import LONGEST_PARAMETER, NAMES_AT_ONCE, fit_names, fit_value


def test_allowed_names_stay_and_others_become_the_nearest() -> None:
    fit = fit_names(["evaluation.tasks.egymmlu (Arabic).value", "a.b/c d-e_1", "a:b", "x%", "../x", "/a//b/", ""])
    assert list(fit.values()) == [
        "evaluation.tasks.egymmlu _Arabic_.value",
        "a.b/c d-e_1",
        "a:b",
        "x_",
        "__/x",
        "a/b",
        "_",
    ]


def test_no_two_names_become_one() -> None:
    fit = fit_names(["a(b)", "a_b_", "a[b]", "a{b}"])
    assert fit["a_b_"] == "a_b_"
    assert len(set(fit.values())) == 4
    assert fit == fit_names(["a(b)", "a_b_", "a[b]", "a{b}"])
    long = fit_names([f"{'x' * 300}{end}" for end in "abc"])
    assert len(set(long.values())) == 3 and max(map(len, long.values())) <= MAX_ENTITY_KEY_LENGTH


@given(
    st.lists(
        st.text(max_size=12) | st.sampled_from(["a(b", "a)b", "..", ".", "/", "a//b", "a/./b", "x" * 260]), max_size=8
    )
)
def test_any_names_are_accepted_and_stay_apart(names: list[str]) -> None:
    fit = fit_names(names)
    assert len(set(fit.values())) == len(set(names)) == len(fit)
    for name in fit.values():
        _validate_metric_name(name)
        assert len(name) <= MAX_ENTITY_KEY_LENGTH


def test_the_names_that_are_changed_are_those_that_mlflow_refuses() -> None:
    for name in ("a(b)", "a%", "a=b", "../x", "a//b"):
        with pytest.raises(MlflowException):
            _validate_metric_name(name)


def test_values_are_cut_where_mlflow_cuts() -> None:
    assert (LONGEST_PARAMETER, NAMES_AT_ONCE) == (MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH)
    assert fit_value(["cloze"]) == "['cloze']"
    assert len(fit_value("x" * 7000)) == LONGEST_PARAMETER and fit_value("x" * 7000).endswith(" ...")
