"""RMSNorm, RoPE and the gate of the MLP as one kernel each, for CuPy arrays: `OPERATIONS` for core/model/llama.py.

As array code each is five launches or more, and in decoding a launch takes longer than its work. The `..._launch`
functions say what to launch, for NumPy arrays too, so that the tracer can run it. The array functions of llama.py
are the oracle, and take the calls that the kernels cannot.
"""

from __future__ import annotations

import numpy as np

from ..core.attention.cuda import Launch
from ..core.device import Array, module_of
from ..core.model import llama
from . import launching
from .flat_views import flat_view

THREADS = 256


def _takes(*arrays: Array) -> bool:
    """True where the kernels can take these arrays: float16 or float32, on a GPU."""
    known = (np.float16, np.float32)
    return module_of(arrays[0]) is not np and all(array.dtype in known for array in arrays)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """`x [..., size]` over its root mean square, times `weight [size]`."""
    if weight.ndim > 1 or not _takes(x, weight):
        return llama.rms_norm(x, weight, eps)
    out = module_of(x).empty(x.shape, x.dtype)
    launching.start(rms_norm_launch(out, module_of(x).ascontiguousarray(x), weight, eps))
    return out


def rms_norm_launch(out: Array, x: Array, weight: Array, eps: float) -> Launch:
    from .fused_kernels import WARPS, rms_norm_kernel

    size = x.shape[-1]
    args = (out.ravel(), x.ravel(), weight, np.int64(size), np.float32(eps))
    return Launch(rms_norm_kernel, (x.size // size, 1), 32 * WARPS, args)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE of `x [num_tokens, heads, head_size]`; `cos` and `sin [num_tokens, 1, head_size]` of minus the angle for the
    first half and of the angle for the second."""
    if not (_takes(x, cos, sin) and x[0].flags.c_contiguous):
        return llama.rotate(x, cos, sin)
    out = module_of(x).empty(x.shape, x.dtype)
    launching.start(rotate_launch(out, x, cos, sin))
    return out


def rotate_launch(out: Array, x: Array, cos: Array, sin: Array) -> Launch:
    """The heads of a token lie side by side in `x`; `out` is contiguous."""
    from .fused_kernels import rotate_kernel

    num_tokens, heads, head_size = x.shape
    sizes = (np.int64(heads), np.int64(head_size // 2), np.int64(x.strides[0] // x.itemsize))
    args = (out.ravel(), flat_view(x), cos.ravel(), sin.ravel(), *sizes)
    return Launch(rotate_kernel, (num_tokens, heads), 32, args)


def gated(gate_up: Array) -> Array:
    """silu(gate) * up of `gate_up [num_tokens, 2 * size]`."""
    if not _takes(gate_up):
        return llama.gated(gate_up)
    num_tokens, both = gate_up.shape
    out = module_of(gate_up).empty((num_tokens, both // 2), gate_up.dtype)
    launching.start(gated_launch(out, gate_up))
    return out


def gated_launch(out: Array, gate_up: Array) -> Launch:
    from .fused_kernels import gated_kernel

    num_tokens, size = out.shape
    args = (out.ravel(), gate_up.ravel(), np.int64(size))
    return Launch(gated_kernel, (num_tokens, -(-size // THREADS)), THREADS, args)


FUSED = llama.Operations(rms_norm=rms_norm, rotate=rotate, gated=gated)
OPERATIONS = FUSED if launching.unavailable() is None else llama.ARRAY_OPERATIONS  # what a model gets on this machine
