"""Policy losses and advantages against rlax."""

import sys
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import pytest

from jaxloss.losses.advantages import gae
from jaxloss.losses.policy import ppo_clip_loss
from jaxloss.testing import draw_normal, draw_uniform
from parity.peers import Row, check, peer, require_peer

SURROGATE = peer("rlax.clipped_surrogate_pg_loss")
ESTIMATES = peer("rlax.truncated_generalized_advantage_estimation")
TOKENS = dict(log_probs=draw_normal("T"), old=draw_normal("T"), advantages=draw_normal("T"))
STEPS = dict(
    rewards=draw_normal("T"),
    values=draw_normal("T"),
    last=draw_normal("1"),
    discounts=draw_uniform("T", 0, 1),
)
LENGTHS = ({"T": 40}, {"T": 1}, {"T": 7})

ROWS = (
    Row(
        loss="ppo_clip_loss",
        peer="rlax.clipped_surrogate_pg_loss",
        ours=lambda log_probs, old, advantages: ppo_clip_loss(
            log_probs, old, advantages, clip_low=0.3, clip_high=0.3
        ),
        theirs=lambda log_probs, old, advantages: SURROGATE(
            jnp.exp(log_probs - old), advantages, 0.3
        ),
        draws=TOKENS,
        note="takes the ratio; one sequence, one clip range, no clamp of the log-ratio",
        sizes=LENGTHS,
    ),
    Row(
        loss="gae",
        peer="rlax.truncated_generalized_advantage_estimation",
        ours=lambda rewards, values, last, discounts: gae(
            rewards, values, last[0], discounts, gae_lambda=0.8
        )[0],
        theirs=lambda rewards, values, last, discounts: ESTIMATES(
            rewards, discounts, 0.8, jnp.concatenate([values, last])
        ),
        draws=STEPS,
        note="takes (reward, discount, lambda, values with the last one); one sequence",
        sizes=LENGTHS,
    ),
)


class Absent(ModuleType):
    """Stands for distrax, which rlax imports: the functions compared here do not need it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


@pytest.fixture(autouse=True)
def without_distrax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dependency, TensorFlow Probability, cannot be imported beside a recent jax."""
    if "rlax" not in sys.modules:
        monkeypatch.setitem(sys.modules, "distrax", Absent("distrax"))
    require_peer("rlax")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
