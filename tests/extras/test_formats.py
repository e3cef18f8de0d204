"""The formats that NumPy lacks: against their definitions, code by code, and against torch where it is installed."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_ref.extras import formats
from paged_ref.extras.formats import (
    choose_scales,
    decode,
    encode,
    from_bfloat16,
    from_float8,
    to_bfloat16,
    to_float8,
)
from paged_ref.kernels import write_kv

Array = np.ndarray[Any, np.dtype[Any]]
CODES = np.arange(256, dtype=np.uint8)
floats = st.floats(width=32, allow_nan=False)


def e4m3(code: int) -> Fraction | None:
    """The definition: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; None is NaN."""
    sign, exponent, mantissa = -1 if code & 0x80 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return None
    if exponent == 0:
        return sign * Fraction(mantissa, 8) * Fraction(2) ** -6
    return sign * (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


def test_every_float8_code_is_worth_what_the_format_says() -> None:
    for code, value in zip(CODES.tolist(), from_float8(CODES).tolist(), strict=True):
        want = e4m3(code)
        assert np.isnan(value) if want is None else Fraction(value) == want
    assert np.signbit(from_float8(np.array([0x80], np.uint8)))[0]  # minus zero
    numbers = CODES & 0x7F != 0x7F
    np.testing.assert_array_equal(to_float8(from_float8(CODES))[numbers], CODES[numbers])


@given(st.one_of(floats, st.floats(-500, 500, width=32), st.floats(-0.03125, 0.03125, width=32)))
def test_to_float8_finds_the_nearest_and_of_two_the_even(number: float) -> None:
    nearest_float8(number)


def test_to_float8_between_all_neighbours() -> None:
    values = from_float8(CODES[:0x7F])
    for low, high in pairwise(values):
        middle = (low + high) / np.float32(2)
        for number in (middle, np.nextafter(middle, high), np.nextafter(middle, low)):
            nearest_float8(float(number))
            nearest_float8(-float(number))


def nearest_float8(number: float) -> None:
    code = int(to_float8(np.array([number], np.float32))[0])
    assert code >> 7 == np.signbit(number)
    exact = abs(Fraction(number)) if np.isfinite(number) else Fraction(10**40)
    distances = {candidate: abs(e4m3(candidate) - exact) for candidate in range(0x7F)}  # type: ignore[operator]
    least = min(distances.values())
    best = [candidate for candidate, distance in distances.items() if distance == least]
    assert code & 0x7F in best
    assert len(best) == 1 or code % 2 == 0


def test_beyond_the_largest_float8_is_the_largest_and_nan_is_nan() -> None:
    numbers = np.array([448, 449, 1e30, np.inf, -np.inf, np.nan], np.float32)
    assert to_float8(numbers).tolist() == [0x7E, 0x7E, 0x7E, 0x7E, 0xFE, 0x7F]


def test_bfloat16_goes_and_comes_back_for_every_code() -> None:
    codes = np.arange(1 << 16, dtype=np.uint16)
    numbers = from_bfloat16(codes)
    nan = np.isnan(numbers)
    np.testing.assert_array_equal(to_bfloat16(numbers)[~nan], codes[~nan])
    assert np.isnan(from_bfloat16(to_bfloat16(numbers[nan]))).all()


def bfloat16(code: int) -> Fraction:
    """The definition, for numbers above 0; infinity's code is, for the purpose of rounding, the next number."""
    exponent, mantissa = code >> 7 & 0xFF, code & 0x7F
    return Fraction(mantissa + (128 if exponent else 0)) * Fraction(2) ** (max(exponent, 1) - 134)


@given(floats)
def test_to_bfloat16_finds_the_nearest_and_of_two_the_even(number: float) -> None:
    down = int(np.array([number], np.float32).view(np.uint32)[0] >> 16)  # towards 0
    code = int(to_bfloat16(np.array([number], np.float32))[0])
    if np.isinf(number):
        assert code == down
        return
    values = [bfloat16(code) for code in (down, down + 1)]
    low, high = (abs(value - abs(Fraction(number))) for value in values)
    assert code == down + (high < low or (high == low and down % 2 == 1))


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_the_error_of_what_is_stored_is_bounded(num_kv_heads: int, head_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = (rng.standard_normal((5, num_kv_heads, head_size)) * rng.uniform(1e-3, 1e3, (num_kv_heads, 1))).astype(
        "f"
    )
    for dtype in ("int8", "uint8"):
        scales = choose_scales(numbers, dtype)
        error = np.abs(decode(encode(numbers, dtype, scales), scales) - numbers)
        steps = scales[:, None] * 1.0001  # float32's own rounding, too
        if dtype == "int8":
            assert (error <= steps / 2).all()
        else:  # half of the last of four bits, or of a step between the smallest numbers
            assert (error <= np.maximum(np.abs(numbers) * 1.0001 / 16, steps * 2**-10)).all()
    assert (np.abs(decode(encode(numbers, "uint16")) - numbers) <= np.abs(numbers) / 256).all()


def test_scales_stretch_each_head_to_the_format() -> None:
    numbers = np.array([[[1, -4]], [[2, 3]]], np.float32) * np.array([[1], [0], [100]], np.float32)
    assert choose_scales(numbers, "int8").tolist() == pytest.approx([4 / 127, 1, 400 / 127])
    stored = encode(numbers, "int8", choose_scales(numbers, "int8"))
    assert stored.dtype == np.int8
    assert stored[0].tolist() == [[32, -127], [0, 0], [32, -127]]
    assert encode(numbers, "uint8", choose_scales(numbers, "uint8"))[0, 2, 1] == 0xFE
    assert choose_scales(numbers[:0], "uint8").tolist() == [1, 1, 1]
    # What comes later and is larger saturates.
    assert encode(numbers * 10, "int8", choose_scales(numbers, "int8"))[0, 0].tolist() == [127, -127]
    assert encode(np.full((1, 1, 1), np.nan, np.float32), "int8", np.ones(1, np.float32)).tolist() == [[[0]]]


@given(st.integers(0, 2**32 - 1), st.sampled_from(["uint16", "int8", "uint8"]), st.sampled_from(["float32", "uint16"]))
def test_write_kv_rounds_to_the_format_of_the_cache(seed: int, dtype: str, given_dtype: str) -> None:
    rng = np.random.default_rng(seed)
    key, value = (encode(rng.standard_normal((3, 2, 4)), given_dtype) for _ in range(2))
    caches = np.full((2, 4, 2, 2, 4), 77, dtype)
    scales = None if dtype == "uint16" else rng.uniform(0.01, 0.1, (2, 2)).astype(np.float32)
    names = {} if scales is None else {"key_scales": scales[0], "value_scales": scales[1]}
    write_kv(key, value, caches[0], caches[1], np.array([6, -1, 1]), **names)
    for i, new in enumerate((key, value)):
        cache = caches[i].reshape(8, 2, 4)
        want = encode(new, dtype, None if scales is None else scales[i])
        np.testing.assert_array_equal(cache[[6, 1]], want[[0, 2]])
        assert (np.delete(cache, [6, 1], axis=0) == 77).all()


@pytest.mark.compare
def test_torch_agrees() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.uniform(-460, 460, 100_000), rng.standard_normal(100_000) * 0.01]).astype(np.float32)
    tensor = torch.from_numpy(numbers)
    np.testing.assert_array_equal(to_float8(numbers), tensor.to(torch.float8_e4m3fn).view(torch.uint8).numpy())
    np.testing.assert_array_equal(from_float8(CODES), torch.from_numpy(CODES).view(torch.float8_e4m3fn).float().numpy())
    np.testing.assert_array_equal(to_bfloat16(numbers), tensor.to(torch.bfloat16).view(torch.uint16).numpy())
    every = np.arange(1 << 16, dtype=np.uint16)
    np.testing.assert_array_equal(
        from_bfloat16(every).view(np.uint32),
        torch.from_numpy(every).view(torch.bfloat16).float().numpy().view(np.uint32),
    )


@pytest.mark.parametrize("dtype", ["uint16", "int8", "uint8"])
def test_a_large_array_is_converted_in_one_pass_and_to_the_same_bits(dtype: str) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((64 * formats.PART // 128, 2, 64), np.float32)
    numbers[7, 1, 3] = np.nan
    scales = None if dtype == "uint16" else np.array([0.02, 0.5], np.float32)
    encode(numbers[:1], dtype, scales)  # what is made once for all
    tracemalloc.start()
    try:
        encoded = encode(numbers, dtype, scales)
        encoding = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        decoded = decode(encoded, scales)
        decoding = tracemalloc.get_traced_memory()[1] - encoded.nbytes
    finally:
        tracemalloc.stop()
    part = 4 * formats.PART  # bytes of float32
    assert encoding < encoded.nbytes + 10 * part
    assert decoding < decoded.nbytes + 10 * part
    for row in range(0, len(numbers), 100):
        np.testing.assert_array_equal(encode(numbers[row : row + 1], dtype, scales)[0], encoded[row])
        np.testing.assert_array_equal(decode(encoded[row : row + 1], scales)[0], decoded[row])
