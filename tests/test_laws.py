"""Every law of `jaxloss.testing` on every case of every loss."""

import os

import jax
import pytest

from jaxloss.testing import LAWS, Case, all_cases, check_loss

CASES = all_cases()
# What needs the float64 oracle; rounding is that of optimised programs, with fused multiply-add.
EXACT = {"accuracy", "gradient_accuracy", "double", "numerical"}
QUICK = [law for law in LAWS if law not in EXACT]


def test_eight_devices_are_there_for_the_device_law() -> None:
    assert jax.device_count() == 8


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_laws(case: Case, request: pytest.FixtureRequest) -> None:
    named = request.config.getoption("--laws")
    everything = None if os.environ.get("FULL_OPTIMIZATION") else QUICK
    check_loss(case.loss, case, laws=named.split(",") if named else everything)
