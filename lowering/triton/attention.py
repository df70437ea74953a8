"""Attention on a GPU: PyTorch's, which chooses between cuDNN's and its own flash kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lowering.ops.attention import attention

attention.impl("triton", name="triton:scaled_dot_product_attention")(attention.reference)


def _shares_heads(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> bool | str:
    """What PyTorch's flash and cuDNN kernels take: elsewhere shared heads would mean its plain form, which holds all
    T · S products, where repeated ones have a kernel."""
    if query.dtype not in (torch.bfloat16, torch.float16) or mask is not None:
        return "the kernels that share keys between heads take 16-bit floats without a mask"
    on_gpu = query.device.type == "cuda" and torch.cuda.is_available()
    if on_gpu and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "the kernels that share keys between heads need an Ampere GPU or a later one"
    if not statically_known_true(query.shape[-1] == value.shape[-1]) or not statically_known_true(
        query.shape[-1] <= 256
    ):
        return "the kernels that share keys between heads take equal head sizes up to 256"
    if causal and not statically_known_true(query.shape[2] == key.shape[2]):
        return "the kernels that share keys between heads mask as many keys as queries"
    return not statically_known_true(query.shape[1] == key.shape[1]) or "every head has keys of its own"


@attention.impl("triton", name="triton:scaled_dot_product_attention (grouped)", when=_shares_heads)
def attention_grouped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Keys and values stay as they are: to repeat them costs 31 µs a layer for 4096 tokens of a Llama-3-8B (H100)."""
    return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=True)
