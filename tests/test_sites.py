"""Matching, smoothing and the portable form: graph facts, then numbers, then refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import call, relative_error, run_pass
from torch import Tensor, nn

import int8pass
from int8pass.recipe import CALIBRATED
from int8pass.smooth import smoothing_vector


class Block(nn.Module):
    """Pre-norm transformer block: three sites of a norm or a product, one of attention."""

    def __init__(self, width: int = 64, norm: type[nn.Module] = nn.LayerNorm, bias: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.o = nn.Linear(width, width, bias=bias)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=bias), nn.Linear(width, 2 * width, bias=bias)
        self.down = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = x + self.o(attended)
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def block(**options: Any) -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    return Block(**options).eval(), torch.randn(2, 9, 64)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_block_has_four_sites(norm: type[nn.Module]) -> None:
    model, x = block(norm=norm)
    result = run_pass(model, x, stage="portable")
    sites = {s.name: (s.producer, [r.path for r in s.readers]) for s in result.facts[0].matches.sites}
    assert sites == {
        "q": ("norm", ["q", "k", "v"]),
        "o": ("tensor", ["o"]),
        "gate": ("norm", ["gate", "up"]),
        "down": ("gate product", ["down"]),
    }
    assert result.refused == {}


EXPECTED_PORTABLE = {  # (quantize_per_token, dequantize, dequantize_weight, splits, linears)
    "default": (4, 4, 7, 4, 14),
    "w8a8": (4, 4, 7, 0, 7),
    "w8a8-asymmetric": (4, 4, 7, 0, 7),
    "w8a16": (0, 0, 7, 0, 7),
    "llm.int8": (4, 4, 7, 4, 14),
}


@pytest.mark.parametrize("preset", EXPECTED_PORTABLE)
def test_portable_and_lowered_forms_of_every_preset(preset: str) -> None:
    model, x = block()
    expected = call(model, x)
    portable = run_pass(model, x, preset, stage="portable")
    ops = portable.ops
    splits = ops["outlier_split"] + ops["outlier_split_dynamic"]
    found = (ops["quantize_per_token"], ops["dequantize"], ops["dequantize_weight"], splits, ops["linear"])
    assert found == EXPECTED_PORTABLE[preset]
    lowered = run_pass(model, x, preset)
    gated = lowered.ops["gated_linear_quantize"] + lowered.ops["gated_linear_quantize_dynamic"]
    linears = lowered.ops["linear_w8a8"] + lowered.ops["linear_w8a16"] + gated
    assert linears == 4, "q, k, v and gate, up merge"
    assert gated == (preset != "w8a16"), "and the product of gate and up joins its linear"
    assert lowered.ops["dequantize_weight"] == 0
    assert relative_error(portable.output, expected) < 0.02
    assert relative_error(lowered.output, portable.output) < 2e-4


def test_prologues_are_fused() -> None:
    model, x = block(norm=nn.RMSNorm, bias=False)
    ops = run_pass(model, x, "w8a8").ops
    assert (ops["norm_quantize"], ops["add_norm_quantize"], ops["gated_linear_quantize"]) == (1, 1, 1)
    assert ops["quantize_per_token"] == 1, "of the attention output"


def test_one_token_keeps_float_activations_by_default_and_int8_when_told() -> None:
    model, x = block()
    assert run_pass(model, x[:1, :1]).ops["linear_w8a16"] == 4
    result = run_pass(model, x[:1, :1], one_row="same")
    assert (result.ops["linear_w8a8"], result.ops["gated_linear_quantize_dynamic"]) == (3, 1)
    assert relative_error(result.output, model(x[:1, :1])) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    model, x = block(norm=nn.RMSNorm)
    result = run_pass(model.to(dtype), x.to(dtype))
    assert result.output.dtype == dtype
    assert result.taken == 7
    assert relative_error(result.output, model(x.to(dtype))) < 0.02


def plant_outliers(model: Block, c: float = 40.0, k: int = 6) -> None:
    """Gamma up, weights down: exact in real arithmetic, and what the outliers of large models look like."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for norm, readers in ((model.norm1, (model.q, model.k, model.v)), (model.norm2, (model.gate, model.up))):
            channels = torch.randperm(norm.weight.numel(), generator=generator)[:k]
            norm.weight[channels] *= c
            if getattr(norm, "bias", None) is not None:
                norm.bias[channels] *= c
            for reader in readers:
                reader.weight[:, channels] /= c


def test_quality_order_with_outliers() -> None:
    """Weight-only ≤ default ≤ naive, by much; smoothing repairs what the outliers did to weights too."""
    model, x = block(norm=nn.RMSNorm, bias=False)
    plant_outliers(model)
    expected = call(model, x)
    error = {p: relative_error(run_pass(model, x, p).output, expected) for p in ("default", "w8a8", "llm.int8")}
    error["unsmoothed"] = relative_error(run_pass(model, x, smoothing="none").output, expected)
    error["unsplit"] = relative_error(run_pass(model, x, outliers="none").output, expected)
    assert error["default"] < 0.3 * error["w8a8"]
    assert error["llm.int8"] < error["w8a8"]
    assert error["default"] < error["unsmoothed"]
    assert error["default"] < error["unsplit"] * 1.05


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_smoothing_preserves_the_function_exactly(norm: type[nn.Module]) -> None:
    """With weight-only scales fine enough nothing but the fold acts: compare the fold through float weights."""
    model, _ = block(norm=norm)
    plant_outliers(model)
    gamma, weights = model.norm1.weight, [m.weight for m in (model.q, model.k, model.v)]
    s = smoothing_vector(gamma, *weights)
    assert int((s != 1).sum()) == 6
    assert torch.equal(s.log2(), s.log2().round()), "powers of two"
    for w in weights:
        assert torch.equal((gamma / s) * (w * s), gamma * w)


def test_smoothing_leaves_ordinary_channels_alone() -> None:
    model, _ = block(norm=nn.RMSNorm)
    assert torch.equal(smoothing_vector(model.norm1.weight, model.q.weight), torch.ones(64))


class TiedToTheResidual(Block):
    """The second norm feeds the residual too: no fold, the site still works."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(x)
        return h + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def test_a_norm_that_feeds_the_residual_is_not_folded() -> None:
    torch.manual_seed(0)
    model, x = TiedToTheResidual(), torch.randn(2, 3, 64)
    plant_outliers(model)
    result = run_pass(model, x)
    assert result.facts[0].smoothing.reasons == {"gate": "what makes it is also read by add"}
    assert result.taken == 3
    assert relative_error(result.output, model(x)) < 0.05


class Refused(nn.Module):
    """One linear of every kind that is not taken."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.router, self.head = nn.Linear(32, 32), nn.Linear(32, 8), nn.Linear(32, 100)
        self.scale = nn.Linear(32, 32)
        self.experts = nn.Parameter(torch.randn(4, 32, 32))
        self.fixed = nn.Parameter(torch.randn(3, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = x + self.body(x)
        chosen = self.router(h).softmax(-1).topk(2, -1).indices
        h = h + nn.functional.linear(h, self.scale.weight * 2)
        h = h + torch.bmm(h.expand(4, -1, -1), self.experts).sum(0)
        return self.head(h), chosen, self.body(self.fixed)


def test_every_linear_not_taken_has_a_reason_and_a_line() -> None:
    torch.manual_seed(0)
    report = int8pass.inspect(Refused(), torch.randn(5, 32))
    reasons = {r.linear: r.reason for r in report.refused}
    assert "router" in reasons["router"]
    assert "output head" in reasons["head"]
    assert any("computed in the graph" in r for r in reasons.values())
    assert any("stacked expert" in r for r in reasons.values())
    assert "its input is a constant" in reasons.values()
    assert report.counts["taken"] == 1
    assert all("test_sites.py" in r.source for r in report.refused)
    assert "return self.head(h)" in str(report)


def test_the_head_on_request() -> None:
    report = int8pass.inspect(Refused(), torch.randn(5, 32), quantize_head=True)
    assert "head" not in {r.linear for r in report.refused}


class Shared(nn.Module):
    """One weight, two sites."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm2(x + self.fc(self.norm1(x))))


def test_a_shared_weight_is_packed_once_and_not_smoothed() -> None:
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(4, 32)
    result = run_pass(model, x)
    assert result.taken == 2
    assert set(result.facts[0].smoothing.reasons.values()) == {"a weight is shared with another linear"}
    codes = {n for n in result.programs[0].constants._names.values() if n.output == 0 and "int8" in n.label}
    assert len(codes) == 1
    assert relative_error(result.output, model(x)) < 0.02


def test_user_parameters_are_never_changed() -> None:
    model, x = block(norm=nn.RMSNorm)
    plant_outliers(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run_pass(model, x)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 123), (123, 7), (5, 1), (1, 64)])
def test_odd_sizes(n: int, k: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(k, n), torch.randn(3, k)
    result = run_pass(model, x)
    assert result.taken == 1
    # One output of a few products has no averaging of rounding errors: bound by the steps, not by the norm.
    step = (
        x.abs().amax() / 127 * model.weight.abs().sum(1).amax()
        + model.weight.abs().amax() / 127 * x.abs().sum(1).amax()
    )
    assert (result.output - model(x)).abs().amax() <= step


@pytest.mark.parametrize("preset", [p for p in int8pass.presets() if p not in CALIBRATED])
def test_strange_inputs(preset: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(32, 16)
    for x in (
        torch.randn(32, 5).t(),  # not contiguous
        torch.randn(1, 32).expand(4, 32),
        torch.randn(8, 64)[:, ::2],
        torch.zeros(3, 32),
        torch.empty(0, 32),
        torch.randn(32),  # a single vector
    ):
        result = run_pass(model, x, preset)
        assert result.output.shape == model(x).shape
        torch.testing.assert_close(result.output, model(x), rtol=0.05, atol=0.05)


def test_nan_and_inf_stay_in_their_token() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(32, 16), torch.randn(4, 32)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    out = run_pass(model, x, "w8a8").output
    assert not torch.isfinite(out[1:3]).any()
    torch.testing.assert_close(out[[0, 3]], model(x)[[0, 3]], rtol=0.05, atol=0.05)


def test_weights_with_nan_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(Exception, match=r"0\.weight holds NaN or Inf"):
        run_pass(model, torch.randn(2, 8))


class Written(nn.Module):
    """A view of `both`, or what is made of one, is read by the linear after `both` has been written."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm, self.a = kind, nn.RMSNorm(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([x, x.cos()], -1)
        part = both[..., :64]
        if self.kind == "view":
            y = self.a(part)
        elif self.kind == "norm":
            part = self.norm(part)
        else:
            part = nn.functional.silu(part) * both[..., 64:]
        both.mul_(3.0).add_(1.0)
        return (y if self.kind == "view" else self.a(part)) + x.sin(), both


@pytest.mark.parametrize("kind", ["view", "norm", "gate"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_nothing_moves_across_a_write(kind: str, scheme: str) -> None:
    model = Written(kind).requires_grad_(False)
    x = torch.randn(2, 9, 64)
    found = run_pass(model, x, scheme)
    assert relative_error(found.output[0], model(x)[0]) < 0.02
    assert (found.ops["linear"], found.ops[f"linear_{scheme}"]) == ((1, 0) if kind == "view" else (0, 1))
    assert not found.ops["norm_quantize"] + found.ops["act_mul_quantize"]
