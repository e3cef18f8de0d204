# mypy: ignore-errors
"""CUDA kernels for what stands between a decoder's products: one pass over memory each. fused.py launches them.

Arrays are flat and contiguous, float16 or float32; all arithmetic is float32, as in core/model/llama.py. A product of
the gate below float32's normal numbers (2**-126) becomes 0.
"""

from __future__ import annotations

import math

from numba import cuda
from numba.types import float32

from .cuda_intrinsics import device

WARPS = 8  # of a CUDA block


@device
def normalize(out, x, weight, row, row_size, eps, total):
    """Write the row at `row`, whose sum of squares is `total` of all threads of the CUDA block together."""
    thread = cuda.threadIdx.x
    sums = cuda.shared.array(WARPS, float32)  # of each warp
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
def rms_norm_kernel(out, x, weight, row_size, eps):
    """out = x / sqrt(mean(x**2) + eps) * weight, for each row. Launch with one CUDA block of 32 * WARPS a row."""
    row, total = cuda.blockIdx.x * row_size, float32(0)
    for i in range(cuda.threadIdx.x, row_size, cuda.blockDim.x):
        number = float32(x[row + i])
        total += number * number
    normalize(out, x, weight, row, row_size, eps, total)


@cuda.jit
def add_norm_kernel(out, x, change, weight, row_size, eps):
    """x += change, then out = rms_norm(x). Launch as rms_norm_kernel."""
    row, total = cuda.blockIdx.x * row_size, float32(0)
    for i in range(cuda.threadIdx.x, row_size, cuda.blockDim.x):
        x[row + i] = float32(x[row + i]) + float32(change[row + i])
        number = float32(x[row + i])  # as it is stored, rounded
        total += number * number
    normalize(out, x, weight, row, row_size, eps, total)  # each thread reads only what it wrote itself


@device
def turn(out, target, x, first, cos, sin, angle, half):
    """RoPE of one head, from x[first] on to out[target] on. `angle`: where the token's row of cos and sin begins."""
    for i in range(cuda.threadIdx.x, half, cuda.blockDim.x):
        low, high = float32(x[first + i]), float32(x[first + half + i])
        out[target + i] = low * float32(cos[angle + i]) + high * float32(sin[angle + i])
        out[target + half + i] = high * float32(cos[angle + half + i]) + low * float32(sin[angle + half + i])


@cuda.jit
def rotate_kernel(out, x, cos, sin, num_heads, half, x_step):
    """RoPE: out = x * cos + partner * sin, where i and i + half are partners in a head.

    Token t's heads begin at x[t * x_step] and at out[t * num_heads * 2 * half]; cos and sin [num_tokens, 2 * half].
    Launch with the grid (num_tokens, num_heads) and any number of threads.
    """
    token, head = cuda.blockIdx.x, cuda.blockIdx.y
    target = (token * num_heads + head) * 2 * half
    turn(out, target, x, token * x_step + head * 2 * half, cos, sin, token * 2 * half, half)


@cuda.jit
def turn_and_write_kernel(
    query, key_cache, value_cache, qk, value, cos, sin, slot_mapping,
    num_heads, num_kv_heads, half, qk_step, value_step, value_first,
):  # fmt: skip
    """RoPE of queries and keys, and the write of K and V to their slots; a negative slot is skipped.

    query [num_tokens, num_heads, 2 * half]; caches [num_slots, num_kv_heads, 2 * half]; cos and sin
    [num_tokens, 2 * half]. Token t's queries and keys begin at qk[t * qk_step], its values at
    value[t * value_step + value_first].
    Launch with the grid (num_tokens, num_heads + 2 * num_kv_heads) and any number of threads.
    """
    token, head, size = cuda.blockIdx.x, cuda.blockIdx.y, 2 * half
    kv_head = head - num_heads
    slot = slot_mapping[token]
    if head < num_heads:
        turn(query, (token * num_heads + head) * size, qk, token * qk_step + head * size, cos, sin, token * size, half)
    elif slot >= 0 and kv_head < num_kv_heads:
        target = (slot * num_kv_heads + kv_head) * size
        turn(key_cache, target, qk, token * qk_step + head * size, cos, sin, token * size, half)
    elif slot >= 0:
        target, first = (slot * num_kv_heads + kv_head - num_kv_heads) * size, token * value_step + value_first
        for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
            value_cache[target + i] = value[first + (kv_head - num_kv_heads) * size + i]


@cuda.jit
def gated_kernel(out, gate_up, size):
    """out = silu(gate) * up, where a row of gate_up is `size` gates and as many ups. Grid (num_rows, any)."""
    row = cuda.blockIdx.x
    for i in range(cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x, size, cuda.gridDim.y * cuda.blockDim.x):
        gate, up = float32(gate_up[2 * row * size + i]), float32(gate_up[(2 * row + 1) * size + i])
        out[row * size + i] = gate / (float32(1) + math.exp(-gate)) * up
