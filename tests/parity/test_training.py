"""Deep supervision, regularisers and task weights against MONAI and torch."""

from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest

from jaxloss.losses.output_penalties import entropy_loss
from jaxloss.losses.regression import squared_error
from jaxloss.testing import draw_normal
from jaxloss.training.multitask import famo_init, famo_update, famo_weights
from jaxloss.training.scales import deep_supervision
from parity.peers import Row, check, require_peer


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


def test_famo_moves_as_torch_s_adam_does() -> None:
    torch = require_peer("torch")
    trace = np.random.default_rng(0).uniform(0.1, 3, (6, 3)).astype(np.float32)
    v = torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([v], lr=0.025, weight_decay=0.01)
    state = famo_init(3, weight_decay=0.01)
    for before, after in zip(trace, trace[::-1], strict=True):
        gap = torch.tensor(before) + 1e-8
        z = torch.softmax(v, -1)
        weights, state = famo_weights(before, state)
        expected = (z / gap / (z / gap).sum()).detach().numpy()
        np.testing.assert_allclose(weights, expected, rtol=3e-6)
        delta = gap.log() - (torch.tensor(after.copy()) + 1e-8).log()
        (v.grad,) = torch.autograd.grad(z, v, grad_outputs=delta)
        adam.step()
        state = famo_update(after, state)
        np.testing.assert_allclose(state.logits, v.detach().numpy(), rtol=1e-5, atol=1e-7)
