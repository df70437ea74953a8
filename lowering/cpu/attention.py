"""Attention on the CPU: our kernel for bf16 where there is AMX, else PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.cpu import native
from lowering.ops.attention import attention

attention.impl("cpu", name="cpu:scaled_dot_product_attention")(attention.reference)

FEWEST_QUERIES = 16  # Tiles have as many rows, and keys are put in order for every call.


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> bool | str:
    if any(x.dtype != torch.bfloat16 for x in (query, key, value)):
        return "the native attention takes bfloat16"
    if mask is not None and mask.dtype != torch.bool and mask.dtype not in native.FLOATS:
        return f"the native attention takes masks of bool and float, not {mask.dtype}"
    if isinstance(query.shape[2], int) and query.shape[2] < FEWEST_QUERIES:
        return f"the native attention takes {FEWEST_QUERIES} queries and more"
    if scale <= 0:
        return "the native attention takes a positive scale"
    return native.refusal() or native.has_tiles() or "the native attention needs AMX"


@attention.impl("cpu", when=_takes)
def native_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Online softmax over blocks of keys; blocks that the mask hides are skipped. Scores and sums in fp32."""
    # Only where it is needed: of every view of a mask the compiler would compute another copy, layer by layer.
    if mask is not None and mask.dim() < 4:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    if mask is not None and mask.shape[-1] != key.shape[2]:
        mask = mask.expand(*mask.shape[:-1], key.shape[2])
    return native.attend(query, key, value, mask, causal, scale).transpose(1, 2)
