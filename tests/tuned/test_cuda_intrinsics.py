"""The Python twins of the intrinsics beside the PTX ISA, whose rules are written down here a second time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paged_ref.core.device import Array
from paged_ref.tracer import trace

pytest.importorskip("numba_cuda", reason="numba-cuda makes the kernels (extra test, cuda12 or cuda13)")

# Numbers in k, and the kind of number as NumPy knows it.
PRODUCTS: dict[str, tuple[int, Any]] = {
    "float16": (16, np.float16),
    "bfloat16": (16, None),
    "tfloat32": (8, np.float32),
}


def word(name: str, values: list[float]) -> int:
    """One word of an operand: the first number in the low half where there are two."""
    if name == "bfloat16":
        low, high = (np.array(values, np.float32).view(np.uint32) >> 16).tolist()  # exact: few bits are set
        return int(low | high << 16)
    return int(np.array(values, PRODUCTS[name][1]).view(np.uint32)[0])


def product_of(mma: Any, words: Array, sums: Array) -> Array:
    """What the 32 lanes of a warp get, [32, 4], for their words [32, 6] and sums [32, 4]."""
    from numba import cuda

    def kernel(words: Any, sums: Any, got: Any) -> None:
        lane = cuda.threadIdx.x
        w, s = words[lane], sums[lane]
        parts = mma(w[0], w[1], w[2], w[3], w[4], w[5], s[0], s[1], s[2], s[3])
        for i in range(4):
            got[lane, i] = parts[i]

    got = np.zeros((32, 4), np.float32)
    trace.run(kernel, 1, 32, words, sums, got)
    return got


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_laid_out_as_the_ptx_manual_says(name: str) -> None:
    """Rows, columns and k of each fragment, written down from "Matrix Fragments for mma.m16n8k16" and m16n8k8."""
    from paged_ref.tuned import cuda_intrinsics as intrinsics

    rng, wide = np.random.default_rng(0), PRODUCTS[name][0]
    a, b, c = (rng.integers(-8, 8, shape).astype(np.float32) for shape in ((16, wide), (wide, 8), (16, 8)))
    words, sums = np.zeros((32, 6), np.uint32), np.zeros((32, 4), np.float32)
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        if wide == 16:
            k = [[2 * member, 2 * member + 1], [2 * member + 8, 2 * member + 9]]
        else:
            k = [[member], [member + 4]]
        words[lane] = [
            word(name, [a[group, i] for i in k[0]]), word(name, [a[group + 8, i] for i in k[0]]),
            word(name, [a[group, i] for i in k[1]]), word(name, [a[group + 8, i] for i in k[1]]),
            word(name, [b[i, group] for i in k[0]]), word(name, [b[i, group] for i in k[1]]),
        ]  # fmt: skip
        sums[lane] = [c[group + 8 * (i // 2), 2 * member + i % 2] for i in range(4)]

    got = product_of(getattr(intrinsics, f"mma_{name}"), words, sums)
    want = a @ b + c
    for lane in range(32):
        assert list(got[lane]) == [want[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] for i in range(4)]


@pytest.mark.parametrize("selector", [0x5410, 0x7632, 0x1110, 0x3332, 0x1100, 0x3322, 0x4400, 0x7733, 0x0123])
def test_bytes_are_picked_as_prmt_picks_them(selector: int) -> None:
    """prmt.b32 in its default mode: digit i names one of the bytes of `second:first`."""
    from paged_ref.tuned.cuda_intrinsics import pick_bytes

    for first, second in np.random.default_rng(0).integers(2**32, size=(50, 2)).tolist():
        both, want = second << 32 | first, 0
        for i in range(4):
            want |= (both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i
        assert pick_bytes.traced_as(first, second, selector) == want


def test_no_byte_is_a_repeated_sign() -> None:
    from paged_ref.tuned.cuda_intrinsics import pick_bytes

    with pytest.raises(IndexError):
        pick_bytes.traced_as(0, 0, 0x1118)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    """cvt.rn.bf16x2: half a unit more in the last place, less a bit where the place is even; each NaN is 0x7FFF."""
    from paged_ref.tuned.cuda_intrinsics import pack_bfloat16

    rng = np.random.default_rng(0)
    numbers = (rng.standard_normal(2000) * 10.0 ** rng.integers(-6, 5, 2000)).astype(np.float32)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001], np.uint32).view(np.float32)
    numbers = np.concatenate([numbers, ties])
    bits = numbers.view(np.uint32)
    want = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    packed = [pack_bfloat16.traced_as(number, -number) for number in numbers]
    assert [word & 0xFFFF for word in packed] == want.tolist()
    assert [word >> 16 for word in packed] == (want ^ 0x8000).tolist()
    assert pack_bfloat16.traced_as(np.float32(np.nan), np.float32(np.inf)) == 0x7F807FFF


def test_two_tf32_hold_21_bits_of_a_float32() -> None:
    """The tensor cores cut what is beyond the 10 bits of a tf32's fraction off."""
    from paged_ref.tuned.flash_elements import split_float32

    rng = np.random.default_rng(0)
    numbers = (rng.standard_normal(2000) * 10.0 ** rng.integers(-6, 5, 2000)).astype(np.float32)
    words = np.zeros((len(numbers), 2), np.uint32)

    def kernel(numbers: Any, words: Any) -> None:
        for i in range(len(numbers)):
            words[i, 0], words[i, 1] = split_float32(numbers[i], numbers[i])

    trace.run(kernel, 1, 1, numbers, words)
    high, low = (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64).T
    assert (np.abs(numbers - high - low) <= 2.0**-21 * np.abs(numbers)).all()
