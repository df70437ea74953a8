"""Masks made of positions: views instead of gathers, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import check_rewrite
from torch import Tensor, nn

from int8pass import masks

Attend = torch.nn.functional.scaled_dot_product_attention


class Call(nn.Module):
    """A function of one tensor."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) * 1.0


def padding(x: Tensor) -> Tensor:
    """`[B, S]` → `[B, 1, 1, S]` as transformers does it."""
    return x[torch.arange(x.shape[0])[:, None, None, None], (torch.arange(x.shape[1]) + 0)[None, None, None, :]]


def in_order(x: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])[None, :]]


VIEWS = {"padding": (padding, 2), "in order": (in_order, 0)}


@pytest.mark.parametrize("name", VIEWS)
def test_index_by_all_positions_is_a_view(name: str) -> None:
    function, unsqueezed = VIEWS[name]
    before = {"index": 1}
    log = check_rewrite(
        masks.index_to_view, Call(function), torch.randn(3, 5), before=before,
        after={"index": 0, "unsqueeze": unsqueezed}, hits=1,
    )  # fmt: skip
    assert log.hits["index_to_view"] == 1


LEFT_ALONE = {
    "other order of axes": lambda x: x[torch.arange(3)[None, :], torch.arange(5)[:, None]],
    "part of an axis": lambda x: x[torch.arange(3)[:, None], torch.arange(4)[None, :]],
    "from the second on": lambda x: x[torch.arange(3)[:, None], torch.arange(1, 5)[None, :]],
    "every second": lambda x: x[torch.arange(3)[:, None], torch.arange(0, 5, 2)[None, :]],
    "shifted": lambda x: x[torch.arange(3)[:, None] - 1, torch.arange(5)[None, :]],
    "pairs": lambda x: x[torch.arange(3), torch.arange(3)],
    "one axis of two": lambda x: x[torch.arange(3)],
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_indices_stay(name: str) -> None:
    model = Call(LEFT_ALONE[name])
    check_rewrite(masks.index_to_view, model, torch.randn(3, 5), before={"index": 1}, after={"index": 1}, hits=0)


def attention(mask: Callable[[Tensor], Tensor]) -> Call:
    def attend(x: Tensor) -> Tensor:
        heads = x.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2)
        return Attend(heads, heads, heads, attn_mask=mask(x[:, :, 0] > -1.0))

    return Call(attend)


def everywhere(keys: Tensor) -> Tensor:
    """True for every query, and for keys that count: `[B, 1, S, S]`."""
    queries = torch.arange(keys.shape[1])[None, None, :, None]
    return queries.new_ones((), dtype=torch.bool) & (queries >= 0) & keys[:, None, None, :]


def causal(keys: Tensor) -> Tensor:
    queries, positions = torch.arange(keys.shape[1])[None, None, :, None], torch.arange(keys.shape[1])
    return (queries >= positions) & keys[:, None, None, :]


def from_the_second_on(keys: Tensor) -> Tensor:
    return (torch.arange(keys.shape[1])[None, None, :, None] >= 1) & keys[:, None, None, :]


def test_a_mask_that_is_true_everywhere_is_dropped() -> None:
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    rule, and_ = masks.drop_all_true, "__and__"
    # the inner `and` stays True everywhere, and goes with the outer one
    check_rewrite(rule, attention(everywhere), x, before={and_: 2}, after={and_: 0, "ge": 0}, hits=2)
    check_rewrite(rule, attention(causal), x, before={and_: 1}, after={and_: 1}, hits=0)
    check_rewrite(rule, attention(from_the_second_on), x, before={and_: 1}, after={and_: 1}, hits=0)


def test_a_mask_that_something_else_reads_keeps_its_shape() -> None:
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    model = Call(lambda x: everywhere(x[:, :, 0] > -1.0).float())
    check_rewrite(masks.drop_all_true, model, x, before={"__and__": 2}, after={"__and__": 1}, hits=1)
