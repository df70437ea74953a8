"""What ran on a GPU, as the inspection shows it: Triton kernels under torch's profiler, traced back to their nodes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8pass
from int8pass.inspect import profiled

pytestmark = pytest.mark.gpu

WIDTH, HIDDEN = 256, 512


class Block(nn.Module):
    """A pre-norm gated MLP and a projection that nothing quantizes: the head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """Two blocks, so that every kernel of a block runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("tokens", [24, 64])
@pytest.mark.parametrize("preset", ["default", "w8a8", "llm.int8", "w8a16"])
def test_every_triton_kernel_belongs_to_its_site(preset: str, tokens: int) -> None:
    torch.manual_seed(0)
    model = Model().eval().to("cuda", torch.bfloat16)
    x = torch.randn(2, tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    report = int8pass.inspect(model, x, recipe=preset, data=[x], schemes=False, sensitivity=False)
    assert report.runtime_note == profiled.NOTE
    fused = {node.name: node for node in report.stages[-1].nodes}
    assert len(report.sites) == 4
    for site in report.sites:
        mine = [row for row in report.runtime if row.site == site.name]
        linears = [row for row in mine if row.implementation == site.implementations[0]]
        assert site.implementations[0].startswith("triton"), site.implementations
        assert ("outlier blocks" in site.scheme) == (preset in {"default", "llm.int8"}), site.scheme
        assert linears, f"no kernel of the linear of {site.name} was seen: {report.runtime}"
        assert site.shape[0] * site.shape[1] < max(row.bytes for row in linears) <= site.bytes[1]
        for row in mine:
            assert row.calls == 1
            assert row.seconds > 0
            assert fused[row.name].site == site.name
            assert fused[row.name].implementation == row.implementation
    unknown = [row for row in report.runtime if row.op.endswith(("_kernel", "_wgmma")) and not row.nodes]
    assert not unknown, "kernels of ours that no node is known of"
    assert all(row.seconds < 0.01 for row in report.runtime), "one kernel of this size takes microseconds"
    assert all(set(row.nodes) <= fused.keys() for row in report.runtime)
    print(report)
