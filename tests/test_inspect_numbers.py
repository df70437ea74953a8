"""What is measured: against an independent calculation; its JSON form; logs, traces and models without weights."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from harness import call, run_pass
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inspect import Breaks, Model, model
from torch import Tensor, nn

import int8pass
from int8pass.inspect import dot, profiled, timing, trace
from int8pass.inspect.numbers import ALPHAS, EXACT, Histograms, Noise
from int8pass.inspect.report import Report, ReportError
from lowering import numerics


def with_outliers() -> tuple[nn.Module, list[Tensor]]:
    """`Model` with two channels forty times larger in the norm and their weights as much smaller."""
    torch.manual_seed(0)
    made = Model().eval()
    with torch.no_grad():
        made.norm.weight[[3, 17]] *= 40
        for linear in (made.gate, made.up):
            linear.weight[:, [3, 17]] /= 40
    return made, [torch.randn(2, 20, 32) for _ in range(3)]


@pytest.fixture(scope="module")
def measured() -> tuple[nn.Module, list[Tensor], Report]:
    made, batches = with_outliers()
    return made, batches, int8pass.inspect(made, batches[0], data=batches, profile=False)


def sqnr(expected: list[Tensor], found: list[Tensor]) -> float:
    noise = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(expected, found))
    return 10 * math.log10(sum(float(a.double().square().sum()) for a in expected) / noise)


def naive(linear: nn.Linear, x: Tensor) -> Tensor:
    """Affine int8 per token, int8 weights per channel, written out."""
    codes, scale, zero = numerics.quantize_affine(x)
    weight, step = numerics.quantize_weight(linear.weight)
    return F.linear((codes.float() - zero) * scale, weight.float() * step[:, None], linear.bias)


@torch.no_grad()
def test_local_errors_are_those_of_the_formulas(measured: tuple[nn.Module, list[Tensor], Report]) -> None:
    made, batches, report = measured
    gate = report.sites[0]
    inputs = [made.norm(x) for x in batches]
    expected = [linear(h) for h in inputs for linear in (made.gate, made.up)]
    found = [naive(linear, h) for h in inputs for linear in (made.gate, made.up)]
    assert gate.errors.naive == pytest.approx(sqnr(expected, found), abs=0.02)
    assert gate.errors.naive < gate.errors.smoothed < gate.errors.final + 3
    assert gate.errors.final > gate.errors.naive + 10


@torch.no_grad()
def test_cumulative_and_output_errors_are_those_of_the_quantized_model(
    measured: tuple[nn.Module, list[Tensor], Report],
) -> None:
    made, batches, report = measured
    expected = [call(made, x) for x in batches]
    found = [run_pass(made, x, stage="portable").output for x in batches]
    assert report.output_sqnr == pytest.approx(sqnr(expected, found), abs=0.05)
    gate, down = report.sites
    assert gate.errors.cumulative == pytest.approx(gate.errors.final, abs=0.05), "nothing is quantized before it"
    assert down.errors.cumulative < down.errors.final
    assert min(gate.errors.alone, down.errors.alone) > report.output_sqnr - 1


@torch.no_grad()
def test_channels_and_smoothing(measured: tuple[nn.Module, list[Tensor], Report]) -> None:
    made, batches, report = measured
    gate = report.sites[0]
    absmax = torch.cat([made.norm(x).reshape(-1, 32) for x in batches]).abs().amax(0)
    weights = torch.cat([made.gate.weight, made.up.weight]).abs().amax(0)
    torch.testing.assert_close(torch.tensor(gate.channels.x_before), absmax, rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.tensor(gate.channels.w_before), weights, rtol=1e-3, atol=0)
    assert gate.smoothed_channels == 2
    moved = [j for j in range(32) if gate.channels.x_after[j] != gate.channels.x_before[j]]
    assert moved == [3, 17]
    for j in range(32):  # what X loses, W gains
        before = gate.channels.x_before[j] * gate.channels.w_before[j]
        assert gate.channels.x_after[j] * gate.channels.w_after[j] == pytest.approx(before, rel=2e-3)
    assert gate.absmax[0] == pytest.approx(float(absmax.max()), rel=1e-3)
    assert gate.absmax[1] < gate.absmax[0] / 3
    share = (torch.cat([made.norm(x).reshape(-1, 32) for x in batches]).abs() >= 6).float().mean(0)
    assert dict(gate.channels.above) == {j: pytest.approx(float(share[j]), abs=1e-4) for j in (3, 17)}


def test_histograms_curves_times_and_bytes(measured: tuple[nn.Module, list[Tensor], Report]) -> None:
    *_, report = measured
    for site in report.sites:
        assert site.tokens == 120
        assert sum(site.histogram.counts) == 120 * site.shape[1]
        assert sum(site.histogram.codes) == 120 * site.shape[1]
        assert site.histogram.clip[0] < 0 < site.histogram.clip[1] <= site.histogram.bound * 2
        assert [alpha for alpha, _ in site.curve] == list(ALPHAS)
        assert all(seconds > 0 for seconds in site.seconds)
        assert site.bytes[0] == 4 * site.shape[0] * site.shape[1]
        assert site.shape[0] * site.shape[1] < site.bytes[1] < 0.4 * site.bytes[0]
    gate = report.sites[0]
    assert max(sqnr for _, sqnr in gate.curve) > gate.errors.naive + 10, "smoothing helps a site with outliers"
    assert [p.name for p in report.schemes][:2] == ["this recipe", "w8a8"]
    schemes = {p.name: p.sqnr for p in report.schemes}
    assert schemes["w8a8"] < schemes["this recipe"]
    assert {row.op for row in report.runtime} >= {"linear_w8a8", "gated_linear_quantize_dynamic"}
    assert {row.site for row in report.runtime} >= {"gate", "down"}


def test_kernels_that_overlap_have_the_time_after_the_one_before() -> None:
    """Back to back or idle in between: their own. Inside another: none. Waiting for another: what is left."""
    assert profiled.own_times([(0.0, 2.0), (2.0, 5.0), (9.0, 10.0)]) == [2.0, 3.0, 1.0]
    assert profiled.own_times([(0.0, 10.0), (1.0, 4.0), (2.0, 12.0), (11.0, 13.0)]) == [10.0, 0.0, 2.0, 1.0]
    assert profiled.own_times([]) == []


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e3)), max_size=30))
def test_times_of_kernels_add_up_to_the_time_that_something_ran(found: list[tuple[float, float]]) -> None:
    spans = sorted((start, start + length) for start, length in found)
    edges = sorted({edge for span in spans for edge in span})
    covered = sum(b - a for a, b in itertools.pairwise(edges) if any(s <= a and b <= e for s, e in spans))
    assert sum(profiled.own_times(spans)) == pytest.approx(covered, abs=1e-6)


def test_what_the_compiled_graph_ran(measured: tuple[nn.Module, list[Tensor], Report]) -> None:
    """Every op of ours is one kernel call, of the site it belongs to; the rest are Inductor's and torch's kernels."""
    made, batches, by_node = measured
    assert by_node.runtime_note == timing.NOTE
    report = int8pass.inspect(made, batches[0], data=batches[:1], schemes=False, sensitivity=False)
    assert report.runtime_note == profiled.NOTE
    fused = {node.name: node for node in report.stages[-1].nodes}
    ours = [row for row in report.runtime if row.site]
    linears = [row for row in ours if row.op in {"linear_w8a8", "gated_linear_quantize_dynamic"}]
    assert {(row.site, row.implementation) for row in linears} == {(s.name, s.implementations[0]) for s in report.sites}
    for row in ours:
        assert row.calls == 1
        assert fused[row.name].site == row.site
        assert fused[row.name].implementation == row.implementation
    for row in linears:
        site = next(s for s in report.sites if s.name == row.site)
        assert site.shape[0] * site.shape[1] < row.bytes <= site.bytes[1]
    assert "Inductor" in {row.implementation for row in report.runtime}
    assert all(row.seconds > 0 for row in report.runtime)
    assert all(set(row.nodes) <= fused.keys() for row in report.runtime)
    heads = [row for row in report.runtime if row.op in {"mm", "addmm"}]
    assert {n for row in heads for n in row.nodes} == {n for n in fused if fused[n].op == "linear"}


def test_without_a_compiler_single_nodes_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(profiled, "compile_observed", fail)
    made, x = model()
    report = int8pass.inspect(made, x, data=[x], schemes=False, sensitivity=False)
    assert report.runtime_note == f"{timing.NOTE}; Inductor failed: RuntimeError: no compiler here"
    assert {row.site for row in report.runtime} >= {"gate", "down"}


def test_kernels_are_named_alike() -> None:
    same = ("torch.ops.aten.mm.default", "extern_kernels.mm", "aten::mm", "aten.mm")
    assert {profiled.plain_name(name) for name in same} == {"mm"}
    assert profiled.plain_name("graph_0_cpp_fused_add_1") == profiled.plain_name("cpp_fused_add_1")
    assert profiled.plain_name("int8pass_cpu::linear_w8a8") == "linear_w8a8"


def test_fixes_are_measured_and_proposed(measured: tuple[nn.Module, list[Tensor], Report]) -> None:
    made, batches, _ = measured
    report = int8pass.inspect(
        made, batches[0], recipe="w8a8", data=batches, schemes=False, sensitivity=False, profile=False
    )
    text = str(report)
    assert 'replace(recipe.at("gate")' in text
    start = text.index("from dataclasses import replace")
    end = text.index("  })", start)
    scope: dict[str, object] = {"recipe": int8pass.Recipe.preset("w8a8")}
    exec(text[start:end].replace("\n  ", "\n") + "\n})", scope)
    mended = int8pass.inspect(
        made, batches[0], recipe=scope["recipe"], data=batches, schemes=False, sensitivity=False, profile=False
    )
    before, after = report.sites[0], next((s for s in mended.sites if s.name == "gate"), None)
    promised = {name: found for name, found, _ in before.fixes}["64 columns"]
    assert after is not None
    assert after.errors.final == pytest.approx(promised, abs=1)  # promised from the last batch, kept on all
    assert after.errors.final > before.errors.final + 3


def test_json_round_trip(measured: tuple[nn.Module, list[Tensor], Report], tmp_path) -> None:
    *_, report = measured
    report.save(tmp_path / "r.json")
    assert Report.load(tmp_path / "r.json") == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plain: plain.update(int8pass_report=2), "a report of form 2"),
        (lambda plain: plain.pop("int8pass_report"), "not an int8pass report"),
        (lambda plain: plain.update(extra=1), "malformed report: 'extra'"),
        (lambda plain: plain["sites"][0].update(columns="many"), "malformed report: expected int"),
        (lambda plain: plain["sites"][0]["shape"].append(3), "malformed report"),
    ],
)
def test_a_wrong_report_is_refused(change, message: str, tmp_path) -> None:
    plain = json.loads(int8pass.inspect(*model()).to_json())
    change(plain)
    (tmp_path / "r.json").write_text(json.dumps(plain))
    with pytest.raises(ReportError, match=message):
        Report.load(tmp_path / "r.json")
    with pytest.raises(ReportError, match="cannot read report"):
        Report.load(tmp_path / "none.json")


def test_stages_follow_the_graph() -> None:
    report = int8pass.inspect(*model())
    assert [s.name for s in report.stages] == ["captured", "normalized", "smoothed", "quantized", "fused"]
    for stage in report.stages:
        names = {node.name for node in stage.nodes}
        assert all(set(node.inputs) <= names for node in stage.nodes)
    ops = {stage.name: [node.op for node in stage.nodes] for stage in report.stages}
    assert ops["captured"].count("linear") == 5
    assert ops["quantized"].count("dequantize") == 2
    fused = [n for n in report.stages[-1].nodes if n.op in {"linear_w8a8", "gated_linear_quantize_dynamic"}]
    assert [(node.site, bool(node.implementation)) for node in fused] == [("gate", True), ("down", True)]
    assert "self.head(x)" in report.sources[next(n for n in report.stages[0].nodes[::-1] if n.op == "linear").source]
    text = dot.render(report, "captured")
    assert text.count("->") == len(list(dot.edges(report.stages[0])))


def test_two_graphs_are_measured_and_the_break_is_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 32)
    report = int8pass.inspect(Breaks(), x, data=[x], schemes=False, profile=False)
    assert [site.graph for site in report.sites] == [0, 1]
    assert all(site.errors.final is not None for site in report.sites)
    assert any("graph_break" in reason and "test_inspect.py" in reason for reason in report.breaks)


class Caches(nn.Module):
    """Writes into a buffer and into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
        self.register_buffer("seen", torch.zeros(32))

    def forward(self, x: Tensor, total: Tensor) -> Tensor:
        h = torch.relu(self.linear(x))
        total.add_(h.sum(0))
        self.seen.add_(h[0])
        return self.out(h) + total + self.seen


def test_measuring_writes_into_the_callers_tensors_once_a_call() -> None:
    torch.manual_seed(0)
    made, x = Caches().eval(), torch.randn(4, 32)
    twin, total, expected = copy.deepcopy(made), torch.zeros(32), torch.zeros(32)
    report = int8pass.inspect(made, (x, total), data=[(x, total)], profile=False)
    with torch.no_grad():
        for _ in range(2):  # the inputs themselves, and the batch
            twin(x, expected)
    assert report.sites
    assert all(site.errors.final is not None and site.errors.alone is None for site in report.sites)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(made.seen, twin.seen)


def test_the_meta_device_gives_the_structure() -> None:
    with torch.device("meta"):
        report = int8pass.inspect(Model(), torch.empty(2, 5, 32), data=[torch.empty(2, 5, 32)])
    assert report.counts == {"graphs": 1, "sites": 2, "taken": 3, "refused": 2}
    assert report.sites[0].channels is None
    assert report.sites[0].bytes[0] == 4 * 128 * 32
    assert "gate" in str(report)


def test_refusals_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="int8pass"):
        int8pass.inspect(*model())
    assert any(
        r.name == "int8pass.pipeline" and "not taken: head: the output head" in r.getMessage() for r in caplog.records
    )


def test_a_compilation_leaves_an_artifact_in_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[dict[str, str], str]] = []
    monkeypatch.setattr(
        trace, "trace_structured", lambda kind, metadata_fn, payload_fn: found.append((metadata_fn(), payload_fn()))
    )
    made, x = model()
    with torch.no_grad():
        torch.compile(made, backend="int8")(x)
    ((metadata, payload),) = found
    assert metadata == {"name": "int8pass", "encoding": "json"}
    content = json.loads(payload)
    assert [site["site"] for site in content["sites"]] == ["gate", "down"]
    assert content["sites"][0]["linears"] == {"gate": [64, 32], "up": [64, 32]}
    assert "output head" in content["refused"][1]["reason"]
    assert any(name.startswith("linear_w8a8 ") for name in content["implementations"])


@given(st.floats(-60, 100), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_sqnr_is_the_ratio_in_decibels(level: float, seed: int) -> None:
    signal = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = Noise()
    for part in (signal[:20], signal[20:]):
        noise.add(part.float(), (part + part * 10 ** (-level / 20)).float())
    assert noise.sqnr == pytest.approx(level, abs=0.2)


def test_sqnr_without_noise_signal_or_finite_values() -> None:
    exact, empty, infinite = Noise(), Noise(), Noise()
    exact.add(torch.ones(3), torch.ones(3))
    infinite.add(torch.ones(3), torch.full((3,), math.inf))
    assert (exact.sqnr, empty.sqnr, infinite.sqnr) == (EXACT, None, None)


@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_histograms_lose_no_value(batches: list[list[float]]) -> None:
    histograms = Histograms()
    for batch in batches:
        histograms.values(torch.tensor(batch))
    counted = histograms.facts()
    seen = batches[next((i for i, b in enumerate(batches) if any(b)), len(batches)) :]
    assert (sum(counted.counts) if counted else 0) == sum(map(len, seen))
    if counted:
        assert counted.bound >= max(abs(v) for b in batches for v in b) * 0.999
