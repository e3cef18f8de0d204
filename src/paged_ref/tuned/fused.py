"""RMSNorm, RoPE and the gate of the MLP as one kernel each, for CuPy arrays.

In array code each is five launches or more, and at decode a launch takes longer than its work. Each function
here says what to launch, for NumPy arrays too, so that the tracer can run it; model/llama.py has the same as
array code, which is the oracle.
"""

from __future__ import annotations

import numpy as np

from ..core.device import Array, module_of
from . import launching
from .launching import Launch, span

THREADS = 256


def usable(*arrays: Array) -> bool:
    """True where these arrays lie on a GPU, and the kernels can take them."""
    known = (np.float16, np.float32)
    return module_of(arrays[0]) is not np and launching.unavailable() is None and all(a.dtype in known for a in arrays)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """`x [num_rows, size]` over its root mean square, times `weight [size]`."""
    out = module_of(x).empty(x.shape, x.dtype)
    launching.start(rms_norm_launch(out, module_of(x).ascontiguousarray(x), weight, eps))
    return out


def rms_norm_launch(out: Array, x: Array, weight: Array, eps: float) -> Launch:
    from .fused_kernels import WARPS, rms_norm_kernel

    size = x.shape[-1]
    args = (out.ravel(), x.ravel(), weight, np.int64(size), np.float32(eps))
    return Launch(rms_norm_kernel, (x.size // size, 1), 32 * WARPS, args)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE of `x [num_tokens, heads, head_size]`, whose heads lie side by side; `cos` and `sin [num_tokens, 1,
    head_size]` of minus the angle for the first half and of the angle for the second. The answer is contiguous."""
    out = module_of(x).empty(x.shape, x.dtype)
    launching.start(rotate_launch(out, x, cos, sin))
    return out


def rotate_launch(out: Array, x: Array, cos: Array, sin: Array) -> Launch:
    from .fused_kernels import rotate_kernel

    num_tokens, heads, head_size = x.shape
    sizes = (np.int64(heads), np.int64(head_size // 2), np.int64(x.strides[0] // x.itemsize))
    args = (out.ravel(), span(x), cos.ravel(), sin.ravel(), *sizes)
    return Launch(rotate_kernel, (num_tokens, heads), 32, args)


def gate(gate_up: Array) -> Array:
    """silu(gate) * up of `gate_up [num_tokens, 2 * size]`."""
    num_tokens, both = gate_up.shape
    out = module_of(gate_up).empty((num_tokens, both // 2), gate_up.dtype)
    launching.start(gate_launch(out, gate_up))
    return out


def gate_launch(out: Array, gate_up: Array) -> Launch:
    from .fused_kernels import gate_kernel

    num_tokens, size = out.shape
    args = (out.ravel(), gate_up.ravel(), np.int64(size))
    return Launch(gate_kernel, (num_tokens, -(-size // THREADS)), THREADS, args)
