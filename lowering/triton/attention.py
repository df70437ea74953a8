"""Attention on a GPU: PyTorch's, which chooses between cuDNN's and its own flash kernels."""

from __future__ import annotations

from lowering.ops.attention import attention

attention.impl("triton", name="triton:scaled_dot_product_attention")(attention.reference)
