"""What tests of properties and of damage share."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy


def holds(
    check: Callable[[Any], None], cases: SearchStrategy[Any], examples: int, record: Callable[..., None] | None = None
) -> None:
    """Runs a check on so many cases, the same in every run; the first case that fails is shown. How many there were,
    and the seconds of the longest, go into `record` (pytest's `record_property`), also where one fails."""
    seconds: list[float] = []

    def timed(case: Any) -> None:
        begun = time.monotonic()
        check(case)
        seconds.append(time.monotonic() - begun)

    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    run = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # a model for each of the cases that lead to a smaller one takes minutes
        suppress_health_check=[*quiet, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    try:
        run(given(cases)(timed))()
    finally:
        if record is not None:
            record("tried", len(seconds))
            record("longest", max(seconds, default=0.0))
    assert len(seconds) >= examples  # not fewer because the cases are few


def few(examples: int, many: int) -> Any:
    """A fixed number of examples in every run, many more where there is time."""
    return pytest.mark.parametrize(
        "examples", [examples, pytest.param(many, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
    )
