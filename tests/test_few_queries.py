"""Attention of few queries on a GPU: when our kernel takes it, and what it computes (interpreted if there is none)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import relative_error, run_pass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import exact, inputs
from test_kernels import CPU, DEVICE, GPU, needs_gpu, needs_triton, on_triton, run_triton
from test_real_model import FirstLayers, smollm2
from torch import Tensor, nn

from int8pass import lower
from int8pass.backend import int8
from lowering.ops.attention import attention
from lowering.registry import random_tensor

OURS = "triton:attention_few_queries"
FROM_BF16 = 4e-3  # of results, and of the weights that multiply the values


class Step(nn.Module):
    """One step of a decoder with a cache of keys and values, heads shared by four."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.norm, self.q, self.o = nn.RMSNorm(64), nn.Linear(64, 8 * 16), nn.Linear(8 * 16, 64)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        q = self.q(self.norm(x)).unflatten(-1, (8, 16)).transpose(1, 2)
        k, v = (c[:, :, None].expand(-1, -1, 4, -1, -1).reshape(len(x), 8, -1, 16) for c in (key, value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask if self.masked else None)
        return x + self.o(y.transpose(1, 2).flatten(2))


def step(masked: bool, keys: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = Step(masked).eval().requires_grad_(False).bfloat16()
    x, key, value = torch.randn(3, 1, 64), torch.randn(3, 2, keys, 16), torch.randn(3, 2, keys, 16)
    mask = torch.rand(3, 1, 1, keys) > 0.3
    return model, (x.bfloat16(), key.bfloat16(), value.bfloat16(), mask)


def compute(args: tuple[Any, ...], programs: int | None = None, fewest: int | None = None) -> Tensor:
    """Our kernel's result; keys shared out as if for so many programs."""
    from lowering.triton import attention as kernels

    kept = kernels.PROGRAMS, kernels.FEWEST_KEYS
    kernels.PROGRAMS, kernels.FEWEST_KEYS = programs or kept[0], fewest or kept[1]
    try:
        chosen = attention.choose("triton", args)
        assert chosen.name == OURS
        return chosen.function(*args).contiguous()  # type: ignore[no-any-return]
    finally:
        kernels.PROGRAMS, kernels.FEWEST_KEYS = kept


# ---------------------------------------------------------------------------------------------------------------------
# Graph facts


@needs_triton
@pytest.mark.parametrize("masked", [False, True])
def test_a_decode_step_takes_our_kernel(masked: bool) -> None:
    """Keys as they are in the cache, two heads of them; their number is symbolic, and no guard comes of it."""
    lower.load_target("triton")
    model, args = step(masked, 37)
    for x in args[1:]:
        torch._dynamo.mark_dynamic(x, x.dim() - 1 if x is args[3] else 2)
    result = run_pass(model, args, "w8a8")
    assert result.ops["attention"] == 1
    [node] = [n for n in result.programs[0].graph.nodes if "attention" in n.name]
    given = [a.meta["val"] if hasattr(a, "meta") else a for a in node.args]
    assert given[1].shape[1] == 2
    assert isinstance(given[1].shape[2], torch.SymInt)
    environment = given[1].shape[2].node.shape_env
    before = len(environment.guards)
    assert attention.choose("triton", tuple(given)).name == OURS
    from lowering.triton.attention import _parts

    assert _parts(2, 37) == 1
    assert _parts(2, given[1].shape[2]) > 16, "a cache that grows does not stay with the parts of its first keys"
    assert len(environment.guards) == before


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@on_triton
@given(
    b=st.integers(1, 2), groups=st.integers(1, 2), shared=st.integers(1, 4), t=st.integers(1, 9), s=st.integers(1, 300),
    d=st.integers(1, 70), e=st.integers(1, 70), programs=st.integers(1, 40),
    kind=st.sampled_from(["none", "causal", "bool", "bool of heads", "float32", "bfloat16", "of keys", "of queries"]),
)  # fmt: skip
@settings(max_examples=12 if GPU else 40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_size_mask_and_number_of_parts(
    run_triton: Callable[..., Any], b: int, groups: int, shared: int, t: int, s: int, d: int, e: int, programs: int,
    kind: str,
) -> None:  # fmt: skip
    q, k, v = inputs(b, groups * shared, groups, t, s, d, e)
    generator = torch.Generator().manual_seed(7)
    shapes = {"bool of heads": (b, groups * shared, t, s), "of keys": (b, 1, 1, s), "of queries": (b, 1, t, 1)}
    shape = shapes.get(kind, (t, s))
    mask = torch.rand(shape, generator=generator) > 0.4
    mask[..., 0] = True
    if "float" in kind:
        mask = torch.where(mask, torch.randn(shape, generator=generator), float("-inf")).to(getattr(torch, kind))
    args = (q, k, v, None if kind in {"none", "causal"} else mask, kind == "causal", d**-0.5)
    on_device = tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in args)
    found = run_triton(compute, on_device, programs, 16).to(CPU).double()
    terms = exact(q, k, v.abs(), *args[3:])  # few values may cancel one another
    assert (found - exact(*args)).norm() < FROM_BF16 * terms.norm()


@on_triton
def test_hidden_keys_and_nan_stay_where_they_are(run_triton: Callable[..., Any]) -> None:
    """A query that sees nothing is 0, also in parts of the keys; NaN reaches the queries that see it."""
    q, k, v = (x.to(DEVICE) for x in inputs(2, 4, 2, 3, 300, 32, 32))
    mask = torch.ones(2, 1, 3, 300, dtype=torch.bool, device=DEVICE)
    mask[0, :, 1], mask[1, :, 2, 40:] = False, False
    for programs in (1, 40):
        found = run_triton(compute, (q, k, v, mask, False, 0.2), programs, 16)
        assert found[0, :, 1].abs().max() == 0
        expected = exact(q, k, v, mask, False, 0.2)
        assert relative_error(found.double(), expected) < FROM_BF16
        poisoned = k.clone()
        poisoned[1, 0, 200, 3] = float("nan")
        after = run_triton(compute, (q, poisoned, v, mask, False, 0.2), programs, 16)
        assert after[1, :2, :2].isnan().all(), "heads 0 and 1 share these keys, and queries 0 and 1 see them"
        after[1, :2, :2] = found[1, :2, :2]
        assert torch.equal(after, found)


@on_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_masks_of_the_least_float(run_triton: Callable[..., Any], dtype: torch.dtype) -> None:
    """As models write them: the query that such a mask hides all keys from sees them as if it hid none (in fp16, which
    leaves scores their digits) or all alike; in parts of keys, too."""
    q, k, v = (x.to(DEVICE) for x in inputs(1, 4, 2, 3, 300, 32, 32))
    mask = torch.zeros(3, 300, dtype=dtype, device=DEVICE)
    mask[0], mask[1, :290], mask[2, 10:] = (torch.finfo(dtype).min,) * 3
    for programs in (1, 40):
        found = run_triton(compute, (q, k, v, mask, False, 0.2), programs, 16)
        expected = exact(q, k, v, mask.double(), False, 0.2)
        if dtype != torch.float16:
            expected[:, :, 0] = v.double().mean(2).repeat_interleave(2, 1)
        for query in range(3):
            assert relative_error(found[:, :, query].double(), expected[:, :, query]) < FROM_BF16


@on_triton
@pytest.mark.parametrize(("batch", "keys"), [(0, 5), (2, 0)])
def test_nothing_to_compute(run_triton: Callable[..., Any], batch: int, keys: int) -> None:
    q, k, v = (x.to(DEVICE) for x in inputs(2, 4, 2, 3, 5, 16, 24))
    found = run_triton(compute, (q[:batch], k[:batch, :, :keys], v[:batch, :, :keys], None, False, 0.2))
    assert found.shape == (batch, 4, 3, 24)
    assert not found.any()


@on_triton
def test_on_real_weights(
    run_triton: Callable[..., Any], smollm2: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last tokens of a text, in the first layers of SmolLM2: no further from fp64 than PyTorch's attention."""
    model, ids = smollm2
    taken = []
    original = F.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
        taken.append((query, key, value))
        return original(query, key, value, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", record)
        FirstLayers(model, 4)(ids)
    assert len(taken) == 4
    for query, key, value in taken:
        shared = query.shape[1] // (groups := model.config.num_key_value_heads)  # type: ignore[union-attr, operator]
        single = [x if x.shape[1] == groups else x[:, ::shared] for x in (key, value)]
        q, k, v = (x.bfloat16() for x in (query[:, :, -2:], *single))
        mask = torch.ones(2, k.shape[2], dtype=torch.bool).tril(k.shape[2] - 2)
        args = (q, k, v, mask, False, q.shape[-1] ** -0.5)
        on_device = tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in args)
        found = run_triton(compute, on_device).to(CPU).double()
        expected = exact(*args)
        assert relative_error(found, expected) < 1.2 * relative_error(attention.reference(*args).double(), expected)


@pytest.mark.gpu
@needs_gpu
def test_heads_further_apart_than_int32_counts() -> None:
    """A cache of 17 million keys a head, of which 64 are filled."""
    cache = torch.empty(1, 2, 17_000_000, 128, device=DEVICE, dtype=torch.bfloat16)
    key = cache[:, :, :64]
    key.copy_(random_tensor(1, 2, 64, 128, device=DEVICE, dtype=torch.bfloat16))
    args = (random_tensor(1, 4, 1, 128, device=DEVICE, dtype=torch.bfloat16, seed=1), key, key, None, False, 0.1)
    assert relative_error(compute(args).double(), exact(*args)) < FROM_BF16


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_with_a_cache_that_grows(masked: bool) -> None:
    model, _ = step(masked, 1)
    model.to(DEVICE)
    compiled = torch.compile(model, backend=int8, fullgraph=True, dynamic=True)
    for keys in (37, 700, 5):
        args = tuple(x.to(DEVICE) for x in step(masked, keys)[1])
        wide = tuple(x.float() if x.is_floating_point() else x for x in args)
        expected = Step(masked).to(DEVICE)
        expected.load_state_dict(model.state_dict())
        assert relative_error(compiled(*args) - args[0], expected(*wide) - wide[0]) < 0.03


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@needs_triton
def test_what_our_kernel_does_not_take() -> None:
    lower.load_target("triton")
    [kernel] = [i for i in attention.implementations if i.name == OURS]
    q, k, v = inputs(1, 4, 2, 3, 30, 16, 16)

    def refusal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str:
        return kernel.refuses((q, k, v, mask, False, 0.25)) or ""

    assert refusal(q, k, v) == ""
    assert "16-bit floats" in refusal(q.float(), k.float(), v.float())
    assert "16-bit floats" in refusal(q, k, v.half())
    assert "masks of bool" in refusal(q, k, v, torch.zeros(3, 30, dtype=torch.int32))
    assert "64 that share keys" in refusal(q.repeat(1, 1, 11, 1), k, v)
    assert refusal(q, q, q, torch.ones(3, 3, dtype=torch.bool)) == refusal(q, q, q) == ""
    long = q.repeat(1, 1, 200, 1)
    assert "shared or masked" in refusal(q, long, long)
    assert refusal(q, long, long, torch.ones(1, 600, dtype=torch.bool)) == ""
    assert "256 channels" in refusal(*(x.repeat(1, 1, 1, 17) for x in (q, k, v)))


__all__ = ["run_triton", "smollm2"]
