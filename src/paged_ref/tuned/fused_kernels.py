# mypy: ignore-errors
"""CUDA kernels for what stands between a decoder's products: one pass over memory each. fused.py launches them.

Arrays are flat and contiguous, float16 or float32; all arithmetic is float32, as in core/model/llama.py.
"""

from __future__ import annotations

import math

from numba import cuda
from numba.types import float32

WARPS = 8  # of a CUDA block


@cuda.jit
def rms_norm_kernel(out, x, weight, row_size, eps):
    """out = x / sqrt(mean(x**2) + eps) * weight, for each row. Launch with one CUDA block of 32 * WARPS a row."""
    row, thread = cuda.blockIdx.x * row_size, cuda.threadIdx.x
    sums = cuda.shared.array(WARPS, float32)  # of each warp
    total = float32(0)
    for i in range(thread, row_size, cuda.blockDim.x):
        number = float32(x[row + i])
        total += number * number
    for step in (16, 8, 4, 2, 1):
        total += cuda.shfl_xor_sync(0xFFFFFFFF, total, step)
    if thread % 32 == 0:
        sums[thread // 32] = total
    cuda.syncthreads()  # Each thread reads what the first of every warp has written.
    total = float32(0)
    for warp in range(WARPS):
        total += sums[warp]
    shrink = float32(1) / math.sqrt(total / float32(row_size) + eps)
    for i in range(thread, row_size, cuda.blockDim.x):
        out[row + i] = float32(x[row + i]) * shrink * float32(weight[i])


@cuda.jit
def rotate_kernel(out, x, cos, sin, num_heads, half, x_step):
    """RoPE: out = x * cos + partner * sin, where i and i + half are partners in a head.

    Token t's heads begin at x[t * x_step] and at out[t * num_heads * 2 * half]; cos and sin [num_tokens, 2 * half].
    Launch with the grid (num_tokens, num_heads) and any number of threads.
    """
    token, head = cuda.blockIdx.x, cuda.blockIdx.y
    first, target = token * x_step + head * 2 * half, (token * num_heads + head) * 2 * half
    for i in range(cuda.threadIdx.x, half, cuda.blockDim.x):
        low, high = float32(x[first + i]), float32(x[first + half + i])
        turn, other = token * 2 * half + i, token * 2 * half + half + i
        out[target + i] = low * float32(cos[turn]) + high * float32(sin[turn])
        out[target + half + i] = high * float32(cos[other]) + low * float32(sin[other])


@cuda.jit
def gated_kernel(out, gate_up, size):
    """out = silu(gate) * up, where a row of gate_up is `size` gates and as many ups. Grid (num_rows, any)."""
    row = cuda.blockIdx.x
    for i in range(cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x, size, cuda.gridDim.y * cuda.blockDim.x):
        gate, up = float32(gate_up[2 * row * size + i]), float32(gate_up[(2 * row + 1) * size + i])
        out[row * size + i] = gate / (float32(1) + math.exp(-gate)) * up
