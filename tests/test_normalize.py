"""Normalization: spellings → canonical ops, with the numbers of the original."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import check_rewrite, relative_error, run_pass
from torch import Tensor, nn

from int8pass import normalize as rules

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Norm(nn.Module):
    """A norm in one spelling, with gamma around 1."""

    def __init__(self, spelling: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter((torch.randn(64, generator=torch.Generator().manual_seed(1)) * 0.3 + 1).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(x, self.weight) + 0


def cast_then_gamma(x: Tensor, w: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gamma_then_cast(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)


def one_plus_gamma(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return ((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)) * (1.0 + w.float())).type_as(x)


def promoted_by_the_inverse(x: Tensor, w: Tensor) -> Tensor:
    inverse = torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * (x * inverse).to(x.dtype)


def products_and_powers(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return ((wide * wide).mean(-1, keepdim=True) + 1e-6).pow(-0.5).mul(wide).to(x.dtype) * w


def division(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


SPELLINGS = [
    cast_then_gamma, gamma_then_cast, one_plus_gamma, promoted_by_the_inverse, products_and_powers, division,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_of_rms_norm(spelling: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    # Exact in half precision where only the order of casts matters; the division spelling rounds once less.
    exact = spelling in {cast_then_gamma, gamma_then_cast, one_plus_gamma, promoted_by_the_inverse}
    tolerance = 0.0 if exact and dtype != torch.float32 else max(1e-6, torch.finfo(dtype).eps)
    log = check_rewrite(
        (rules.drop_noop, rules.raise_rms_norm), Norm(spelling, dtype), x,
        before={"mean": 1}, after={"mean": 0, "rms_norm": 1}, hits=1 + _noops(spelling, dtype), tolerance=tolerance,
    )  # fmt: skip
    assert log.hits["raise_rms_norm"] == 1


def _noops(spelling: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> int:
    """Casts that are no-ops in fp32: those of x, of the result, and of gamma."""
    if dtype != torch.float32:
        return 0
    return {one_plus_gamma: 3}.get(spelling, 2)


class BiasedMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6 * x.sum())


class OtherAxis(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


class ThroughoutHalf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [(BiasedMean(), torch.float32), (OtherAxis(), torch.float32), (ThroughoutHalf(), torch.bfloat16)],
)
def test_what_only_looks_like_a_norm_stays(model: nn.Module, dtype: torch.dtype) -> None:
    check_rewrite(
        rules.raise_rms_norm,
        model,
        torch.randn(4, 4, 64).to(dtype),
        before={"mean": 1},
        after={"mean": 1, "rms_norm": 0},
        hits=0,
    )


class AtenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(48)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_aten_rms_norm_with_its_default_epsilon() -> None:
    check_rewrite(
        rules.aten_rms_norm, AtenNorm(), torch.randn(3, 48), before={"rms_norm": 1}, after={"rms_norm": 1}, hits=1
    )


class Addmm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(24, 40)), nn.Parameter(torch.randn(40))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class MatmulPlusBias(Addmm):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class TransposedMatmul(Addmm):
    def forward(self, x: Tensor) -> Tensor:
        return self.bias + torch.matmul(x, self.weight.t().contiguous().detach().t())


@pytest.mark.parametrize(("model", "before"), [(Addmm(), {"addmm": 1}), (MatmulPlusBias(), {"matmul": 1})])
def test_products_with_a_constant_become_linears(model: nn.Module, before: dict[str, int]) -> None:
    all_rules = (rules.addmm_to_linear, rules.matmul_to_linear, rules.add_bias)
    hits = 1 if "addmm" in before else 2
    check_rewrite(
        all_rules,
        model,
        torch.randn(5, 24),
        before=before,
        after={"linear": 1, "addmm": 0, "matmul": 0, "add": 0},
        hits=hits,
    )


class TwoActivations(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.transpose(-1, -2)


def test_a_product_of_activations_is_no_linear() -> None:
    check_rewrite(
        rules.matmul_to_linear, TwoActivations(), torch.randn(5, 24), before={"matmul": 1}, after={"matmul": 1}, hits=0
    )


class InPlace(nn.Module):
    """The linear's input is written in place afterwards: nothing may read past that."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        out = self.fc(y)
        y.add_(1.0)
        return out + y


def test_values_written_in_place_are_left_alone() -> None:
    x = torch.randn(3, 16)
    model = InPlace()
    result = run_pass(model, x)
    assert result.taken == 0
    assert "in place" in next(iter(result.refused.values()))
    assert relative_error(result.output, model(x)) < 1e-6
