"""The operator of the Gluon kernels: `lowering.triton.hopper`, and `lowering.triton.hopper_few` for up to 64 rows.

An op of its own and no traced launch: neither Inductor nor AOTAutograd knows Gluon.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from triton.runtime.jit import MockTensor

from lowering.triton import ahead, hopper, hopper_few
from lowering.triton.hopper import NO_ACTIVATION, Launch
from lowering.triton.launch import expected_rows, per_row

# Weights that some launch has read, in which version.
_settled: Any = WeakIdKeyDictionary()


@torch.library.custom_op("int8pass_triton::linear_w8a8_wgmma", mutates_args=())
def linear_wgmma(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    outliers: Tensor | None,
    outlier_weight: Tensor | None,
    code_columns: bool,
    high: Tensor | None,
    blocks: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    act: int,
) -> Tensor:
    """The linear of `codes[..., K]`; with `act` (a code of `lowering.triton.act`) the gated product of its halves.

    With `code_columns` the outlier weights are columns of the codes `weight`, as `dtype`, and take its scale. `high`
    and `blocks` are those of `lowering.ops.hilo`. `residual`, of the result's shape and type, is added before the one
    rounding (not to a gated product).
    """
    n = weight.shape[0] if act == NO_ACTIVATION else weight.shape[0] // 2
    out = torch.empty((*codes.shape[:-1], n), dtype=dtype, device=codes.device)
    if out.numel():
        zeros = None if zero_point is None else per_row(zero_point, codes)
        flat = None if outliers is None else _aligned(outliers.reshape(-1, outliers.shape[-1]))
        weight = _aligned(weight)
        launch = _launch(
            codes.device, _aligned(codes.reshape(-1, codes.shape[-1])), per_row(scale, codes), zeros,
            weight, weight_scale.contiguous(), None if weight_sum is None else weight_sum.contiguous(),
            None if bias is None else bias.contiguous(), flat,
            None if outlier_weight is None else _aligned(outlier_weight), code_columns,
            None if high is None else _aligned(high.reshape(-1, high.shape[-1])),
            None if blocks is None else per_row(blocks, codes).contiguous(),
            None if residual is None else _aligned(residual.reshape(-1, n)), out.view(-1, n), act,
        )  # fmt: skip
        ahead.wait()
        if launch.constants.get("launch_pdl"):
            _settle(weight)
        launch.kernel[(launch.programs,)](*launch.arguments, **launch.constants)
    return out


@linear_wgmma.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    outliers: Tensor | None,
    outlier_weight: Tensor | None,
    code_columns: bool,
    high: Tensor | None,
    blocks: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    act: int,
) -> Tensor:
    n = weight.shape[0] if act == NO_ACTIVATION else weight.shape[0] // 2
    out = codes.new_empty((*codes.shape[:-1], n), dtype=dtype)
    m, k = expected_rows(math.prod(codes.shape[:-1])), codes.shape[-1]
    if m and ahead.possible(codes.device):
        rows, r = weight.shape[0], 0 if outliers is None else outliers.shape[-1]
        launch = _launch(
            codes.device, _stand(codes, m, k), _stand(scale, m), _stand(zero_point, m), _stand(weight, rows, k),
            _stand(weight_scale, rows), _stand(weight_sum, rows), _stand(bias, rows), _stand(outliers, m, r),
            _stand(outlier_weight, rows, r), code_columns, _stand(high, m, k), _stand(blocks, m),
            _stand(residual, m, n), _stand(out, m, n), act,
        )  # fmt: skip
        ahead.compile(launch.kernel, codes.device, launch.arguments, launch.constants)
    return out


def _stand(tensor: Tensor | None, *shape: int) -> MockTensor | None:
    """What the compiler takes for a contiguous tensor of this type."""
    return None if tensor is None else MockTensor(tensor.dtype, [*shape])


def _aligned(matrix: Tensor) -> Tensor:
    """Rows contiguous and 16-byte aligned, as TMA wants them."""
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
    apart = matrix.stride(0) >= matrix.shape[1] and matrix.stride(1) == 1
    return matrix if aligned and apart else matrix.clone(memory_format=torch.contiguous_format)


def _settle(weight: Tensor) -> None:
    """Put a kernel between what wrote a weight and its first launch that reads it before the kernel ahead has ended.

    A weight here is a constant: made by PyTorch's operators on this stream, and written by such as count versions.
    What writes it otherwise (`.data`, a kernel given its address) is read as it should be if it does not itself let the
    next kernel start early, as none but ours does.
    """
    version = 0 if weight.is_inference() else weight._version
    if _settled.get(weight) != version:
        weight.new_empty(1).zero_()
        _settled[weight] = version


def _launch(
    device: torch.device, codes: Any, scale: Any, zero_point: Any | None, weight: Any, weight_scale: Any,
    weight_sum: Any | None, bias: Any | None, outliers: Any | None, outlier_weight: Any | None, code_columns: bool,
    high: Any | None, blocks: Any | None, residual: Any | None, out: Any, act: int,
) -> Launch:  # fmt: skip
    operands = (
        device, codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight,
        code_columns, high, blocks, residual, out,
    )  # fmt: skip
    if act == NO_ACTIVATION and codes.shape[0] <= hopper_few.ROWS:
        return hopper_few.launch(*operands)
    return hopper.launch(*operands, act)
