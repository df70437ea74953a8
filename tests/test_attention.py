"""Attention is found with its keys before they are repeated, and our kernel computes it as it is defined."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from harness import relative_error, run_pass
from hypothesis import given, settings
from hypothesis import strategies as st
from test_real_model import smollm2
from torch import Tensor, nn

import lowering.cpu  # noqa: F401
from int8pass import attention as attention_rule
from int8pass import fuse, lower
from int8pass.backend import int8
from lowering.cpu import native
from lowering.ops.attention import attention
from lowering.registry import random_tensor

needs_tiles = pytest.mark.skipif(not native.has_tiles(), reason="the native attention needs AMX")
CPU = torch.device("cpu")
WIDTH, HEADS, GROUPS, DEPTH = 64, 4, 2, 16


def repeat(x: Tensor, times: int) -> Tensor:
    """Every head `times` times, the way models write it."""
    b, g, s, d = x.shape
    return x[:, :, None, :, :].expand(b, g, times, s, d).reshape(b, g * times, s, d)


class Attention(nn.Module):
    """Pre-norm self-attention with grouped keys. `form` is how the heads are shared."""

    def __init__(self, form: str = "repeat") -> None:
        super().__init__()
        self.form = form
        self.norm = nn.RMSNorm(WIDTH)
        self.q, self.o = nn.Linear(WIDTH, HEADS * DEPTH), nn.Linear(HEADS * DEPTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, GROUPS * DEPTH), nn.Linear(WIDTH, GROUPS * DEPTH)

    def forward(self, x: Tensor) -> Tensor:
        h, batch = self.norm(x), x.shape[0]
        q, k, v = (f(h).view(batch, -1, n, DEPTH).transpose(1, 2) for f, n in
                   ((self.q, HEADS), (self.k, GROUPS), (self.v, GROUPS)))  # fmt: skip
        if self.form == "enable_gqa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        elif self.form == "read twice":
            k = repeat(k, HEADS // GROUPS)
            y = F.scaled_dot_product_attention(q, k, repeat(v, HEADS // GROUPS), is_causal=True) + k.mean()
        elif self.form == "dropout":
            y = F.scaled_dot_product_attention(q, repeat(k, 2), repeat(v, 2), dropout_p=0.5)
        elif self.form == "interleaved":  # head h reads the keys of group h % 2
            k, v = (x.repeat(1, 2, 1, 1) for x in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
        else:
            y = F.scaled_dot_product_attention(q, repeat(k, 2), repeat(v, 2), is_causal=True)
        return x + self.o(y.transpose(1, 2).reshape(batch, -1, HEADS * DEPTH))


def built(form: str = "repeat", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Attention(form).eval().requires_grad_(False).to(dtype), torch.randn(2, 40, WIDTH).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Graph facts


@pytest.mark.parametrize(
    ("form", "heads"), [("repeat", GROUPS), ("enable_gqa", GROUPS), ("read twice", GROUPS), ("interleaved", HEADS)]
)
def test_keys_are_taken_before_they_are_repeated(form: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = built(form)
    result = run_pass(model, x, "w8a16")
    assert result.ops["attention"] == 1
    assert result.ops["scaled_dot_product_attention"] == 0
    [node] = [n for n in result.programs[0].graph.nodes if "attention" in n.name]
    assert [a.meta["val"].shape[1] for a in node.args[:3]] == [HEADS, heads, heads]
    assert node.args[5] == (0.3 if form == "interleaved" else DEPTH**-0.5)
    monkeypatch.setattr(fuse, "fuse_attention", lambda node, edit: None)
    fuse.fuse_attention.__name__ = "fuse_attention"
    before = run_pass(model, x, "w8a16")
    assert before.ops["attention"] == 0
    assert torch.equal(result.output, before.output), "where PyTorch computes it, nothing changes"


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((1, 4, 20, 16), (2, 4, 30, 16), (2, 4, 30, 16)),  # latents that read every sequence
        ((2, 4, 20, 16), (1, 4, 30, 16), (1, 4, 30, 16)),
        ((2, 4, 20, 16), (2, 2, 30, 16), (2, 1, 30, 16)),
        ((2, 1, 20, 16), (2, 4, 30, 16), (2, 4, 30, 16)),
    ],
)
def test_what_is_broadcast_stays_as_it_is(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> None:
    """Our kernels take as many sequences and heads of each; PyTorch's function takes these, or says why not."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.o = nn.Linear(16, 8)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if key[1] != value[1]:
                k, v = repeat(k, 2), v.expand(-1, 4, -1, -1)
            return self.o(F.scaled_dot_product_attention(q, k, v))

    torch.manual_seed(0)
    model = Model().bfloat16().requires_grad_(False)
    args = tuple(torch.randn(shape).bfloat16() for shape in (query, key, value))
    result = run_pass(model, args, "w8a16")
    shared = key[1] != value[1]  # repeated, they are as many
    assert (result.ops["attention"], result.ops["scaled_dot_product_attention"]) == ((1, 0) if shared else (0, 1))
    assert result.output.shape == model(*args).shape
    assert relative_error(result.output, model(*args)) < 0.02


def test_dropout_stays_as_it_is() -> None:
    model, x = built("dropout")
    assert run_pass(model, x, "w8a16").ops["attention"] == 0


def test_the_rule_finds_nothing_in_its_own_result() -> None:
    model, x = built()
    [program] = run_pass(model, x, "w8a16").programs
    assert not any(attention_rule.fuse_attention(n, None) for n in program.graph.nodes)  # type: ignore[arg-type]


@needs_tiles
def test_bf16_takes_our_kernel_and_fp32_does_not() -> None:
    for dtype, name in ((torch.bfloat16, "cpu:native_attention"), (torch.float32, "cpu:scaled_dot_product_attention")):
        model, x = built(dtype=dtype)
        chosen = run_pass(model, x, "w8a8").facts[0].implementations
        assert chosen["attention", name] == 1


@needs_tiles
def test_a_mask_is_computed_once_for_all_layers() -> None:
    """Compiled by Inductor, with sizes that change: the layers share one mask, and agree with eager."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            for layer in self.layers:
                q, k, v = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
                heads = [y.unflatten(-1, (HEADS, DEPTH)).transpose(1, 2) for y in (q, k, v)]
                y = F.scaled_dot_product_attention(*heads, attn_mask=mask)
                x = x + layer.out_proj(y.transpose(1, 2).flatten(2))
            return x

    torch.manual_seed(0)
    model = Model().eval().requires_grad_(False).bfloat16()
    compiled = torch.compile(copy.deepcopy(model), backend=int8, fullgraph=True, dynamic=True)
    for tokens in (33, 100):
        x = torch.randn(2, tokens, WIDTH).bfloat16()
        assert relative_error(compiled(x) - x, model(x) - x) < 0.02


# ---------------------------------------------------------------------------------------------------------------------
# Numbers

_FROM_BF16 = 4e-3  # of results, and of the weights that multiply the values


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    wide = [x.double() for x in (q, repeat(k, q.shape[1] // k.shape[1]), repeat(v, q.shape[1] // v.shape[1]))]
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    return F.scaled_dot_product_attention(*wide, mask, 0.0, causal, scale=scale)


def ours(*args: object) -> Tensor:
    chosen = attention.choose("cpu", args)
    assert chosen.name == "cpu:native_attention"
    return chosen.function(*args)  # type: ignore[no-any-return]


def inputs(b: int, h: int, g: int, t: int, s: int, d: int, e: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((b, h, t, d), (b, g, s, d), (b, g, s, e))
    q, k, v = (random_tensor(*size, device=CPU, dtype=torch.bfloat16, seed=i) for i, size in enumerate(sizes))
    return q, k, v


@needs_tiles
@given(
    b=st.integers(1, 2), groups=st.integers(1, 2), shared=st.integers(1, 3), t=st.integers(16, 90),
    s=st.integers(1, 600), d=st.integers(1, 130), e=st.integers(1, 70),
    kind=st.sampled_from(["none", "causal", "bool", "bool of heads", "float32", "bfloat16", "of keys"]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_size_and_mask(b: int, groups: int, shared: int, t: int, s: int, d: int, e: int, kind: str) -> None:
    q, k, v = inputs(b, groups * shared, groups, t, s, d, e)
    generator = torch.Generator().manual_seed(7)
    shape = {"bool of heads": (b, groups * shared, t, s), "of keys": (b, 1, 1, s)}.get(kind, (t, s))
    mask = torch.rand(shape, generator=generator) > 0.4
    mask[..., 0] = True
    if "float" in kind:
        mask = torch.where(mask, torch.randn(shape, generator=generator), float("-inf")).to(getattr(torch, kind))
    arguments = (q, k, v, None if kind in {"none", "causal"} else mask, kind == "causal", d**-0.5)
    assert relative_error(ours(*arguments).double(), exact(*arguments)) < _FROM_BF16


@needs_tiles
def test_any_layout() -> None:
    q, k, v = inputs(2, 4, 4, 40, 50, 64, 64)
    mask = torch.rand(50, 40) > 0.3
    plain = ours(q, k, v, mask.T.contiguous(), False, 0.125)
    strided = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v))
    assert torch.equal(ours(*strided, mask.T, False, 0.125), plain)
    between = (F.pad(x, (3, 5))[..., 3:-5] for x in (q, k, v))
    assert torch.equal(ours(*between, mask.T, False, 0.125), plain)
    first = ours(q[:1].expand(2, -1, -1, -1), k, v, mask.T[:, :1], False, 0.125)
    assert torch.equal(first, ours(q[:1].repeat(2, 1, 1, 1), k, v, mask.T[:, :1].repeat(1, 50), False, 0.125))


@needs_tiles
def test_rows_that_see_nothing_are_zero_and_nan_stays_in_its_row() -> None:
    q, k, v = inputs(1, 2, 2, 40, 300, 32, 32)
    mask = torch.ones(40, 300, dtype=torch.bool)
    mask[3], mask[5, :290], mask[7, 20:] = False, False, False
    expected = exact(q, k, v, mask, False, 0.2)
    found = ours(q, k, v, mask, False, 0.2)
    assert found[:, :, 3].abs().max() == 0
    assert relative_error(found.double(), expected) < _FROM_BF16
    q[0, 1, 9, 2] = float("nan")
    poisoned = ours(q, k, v, mask, False, 0.2)
    assert poisoned[0, 1, 9].isnan().all()
    poisoned[0, 1, 9] = found[0, 1, 9]
    assert torch.equal(poisoned, found)


@needs_tiles
def test_large_scores_do_not_overflow() -> None:
    q, k, v = inputs(1, 1, 1, 32, 700, 64, 64)
    arguments = (q * 100, k * 100, v, None, False, 1.0)
    assert relative_error(ours(*arguments).double(), exact(*arguments)) < _FROM_BF16
    assert ours(q[:, :, :, :0], k[..., :0], v, None, False, 1.0).isfinite().all(), "of no channels: the mean"


@needs_tiles
def test_on_real_weights(smollm2: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2 in bf16: no further from the model in fp32 than with PyTorch's attention."""
    original, ids = smollm2
    model = copy.deepcopy(original.model).bfloat16()  # type: ignore[operator, union-attr]
    with torch.no_grad():
        expected = original.model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator, union-attr]
    errors = []
    for target in (True, False):
        monkeypatch.setattr(native, "has_tiles", lambda target=target: target)
        result = run_pass(model, {"input_ids": ids, "use_cache": False}, "w8a16")
        name = "cpu:native_attention" if target else "cpu:scaled_dot_product_attention"
        assert result.facts[0].implementations["attention", name] == 30
        errors.append(relative_error(result.output.last_hidden_state.float(), expected))
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_does_not_repeat_keys() -> None:
    """Repeated for every head they would take twice the memory of the result, beside it."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("heads share keys from Ampere on")
    query = torch.randn(1, 32, 2048, 128, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(1, 4, 2048, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lower.load_target("triton")
    arguments = (query, key, value, None, True, 128**-0.5)
    chosen = attention.choose("triton", arguments)
    function = torch.compile(chosen.function, fullgraph=True)
    function(*arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = function(*arguments)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * found.nbytes
    assert relative_error(found, attention.reference(*(t.float() for t in arguments[:3]), *arguments[3:])) < 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@needs_tiles
def test_what_our_kernel_does_not_take() -> None:
    q, k, v = inputs(1, 2, 2, 20, 30, 16, 16)
    [kernel] = [i for i in attention.implementations if i.name == "cpu:native_attention"]
    assert kernel.refuses((q, k, v, None, True, 0.25)) is None
    assert "takes bfloat16" in (kernel.refuses((q.float(), k.float(), v.float(), None, True, 0.25)) or "")
    assert "16 queries" in (kernel.refuses((q[:, :, :1], k, v, None, False, 0.25)) or "")
    assert "positive scale" in (kernel.refuses((q, k, v, None, False, -0.25)) or "")
    assert "masks of bool" in (kernel.refuses((q, k, v, torch.zeros(20, 30, dtype=torch.int32), False, 0.25)) or "")
    before = native.use_tiles(False)
    try:
        assert "needs AMX" in (kernel.refuses((q, k, v, None, True, 0.25)) or "")
        assert attention.choose("cpu", (q, k, v, None, True, 0.25)).name == "cpu:scaled_dot_product_attention"
    finally:
        native.use_tiles(before)


__all__ = ["smollm2"]
