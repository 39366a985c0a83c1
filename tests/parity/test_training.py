"""Deep supervision and regularisers against MONAI and torch."""

from pkgutil import resolve_name
from typing import Any

import pytest

from jaxloss.losses.output_penalties import entropy_loss
from jaxloss.losses.regression import squared_error
from jaxloss.testing import draw_normal
from jaxloss.training.scales import deep_supervision
from parity.peers import Row, check


def deeply(finest: Any, middle: Any, coarsest: Any, target: Any) -> Any:
    """MONAI's wrapper around a mean of squares, channels first."""
    torch = resolve_name("torch")
    loss = resolve_name("monai.losses.DeepSupervisionLoss")(torch.nn.MSELoss())
    preds = [x.movedim(-1, 1) for x in (finest, middle, coarsest)]
    weights = loss.get_weights(3)  # its forward adds up in float32 whatever it is given
    parts = [loss.get_loss(p, target.movedim(-1, 1)) for p in preds]
    return sum(w * part for w, part in zip(weights, parts, strict=True))


def ours(finest: Any, middle: Any, coarsest: Any, target: Any) -> Any:
    return deep_supervision(squared_error, [finest, middle, coarsest], target)[0]


ROWS = (
    Row(
        "deep_supervision",
        "monai.losses.DeepSupervisionLoss",
        ours,
        deeply,
        dict(
            finest=draw_normal("B 9 6 C"),
            middle=draw_normal("B 5 3 C"),
            coarsest=draw_normal("B 2 2 C"),
            target=draw_normal("B 9 6 C"),
        ),
        "channels last; the target nearest to each pixel, odd sizes included",
        differentiate=("finest", "middle", "coarsest"),
    ),
    Row(
        "entropy_loss",
        "torch.distributions.Categorical.entropy",
        lambda logits: entropy_loss(logits, reduction="none"),
        lambda logits: resolve_name("torch.distributions.Categorical")(logits=logits).entropy(),
        dict(logits=draw_normal("B T C", scale=2)),
        "a loss, with the usual tail",
        differentiate=("logits",),
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_value_and_gradient_agree(row: Row) -> None:
    check(row)
