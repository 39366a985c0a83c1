"""Every law of `jaxloss.testing` on every case of every loss."""

import jax
import pytest

from jaxloss.testing import Case, all_cases, check_loss

CASES = all_cases()


def test_eight_devices_are_there_for_the_device_law() -> None:
    assert jax.device_count() == 8


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_laws(case: Case) -> None:
    check_loss(case.loss, case)
