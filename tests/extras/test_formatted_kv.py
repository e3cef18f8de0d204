"""KV caches in smaller formats: what is stored, its scales, its transfers, and what the engine writes with them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from support.driving import Engine, Run

from paged_ref import LLM, SamplingParams
from paged_ref.core.attention.attention import Addresses
from paged_ref.core.device import to_host, xp
from paged_ref.core.memory.kv import KVCache
from paged_ref.core.memory.manager import Transfer
from paged_ref.core.model.config import kv_bytes_per_token
from paged_ref.extras.formats import choose_scales, decode
from paged_ref.extras.formatted_kv import FORMATS, HEADROOM, FormattedKV
from paged_ref.extras.sanitizer import SanitizedKV
from paged_ref.tuned import linear

SIZES = (2, 6, 4, 2, 8)  # layers, blocks, block size, KV heads, head size
SCALED = ["int8", "float8"]
PAPER = "Four score and seven years ago our"
PROMPTS = [PAPER, "Once upon a time", "The cat", "Tom saw a big dog in the park and"]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
# Of logits up to 20: twice what was seen. float32 and float32 differ by 1e-5 at most.
BOUNDS = {"bfloat16": 0.05, "int8": 0.4, "float8": 1.0}


# --- what is stored --------------------------------------------------------------------------------------


def numbers(seed: int, num_tokens: int, size: float = 1.0) -> Any:
    """Query, key and value of so many tokens; two query heads share a KV head."""
    rng = np.random.default_rng(seed)
    made = [rng.standard_normal((num_tokens, heads, 8)).astype("f") * np.float32(size) for heads in (4, 2, 2)]
    return [xp.asarray(each) for each in made]


def addresses(length: int, count: int, blocks: list[int]) -> Addresses:
    """Of one sequence in these blocks, whose last `count` of `length` tokens are computed."""
    positions = np.arange(length - count, length)
    slots = [blocks[position // 4] * 4 + position % 4 for position in positions.tolist()]
    arrays = [np.array(each, np.int32) for each in ([length], [0, count], [blocks], slots)]
    seq_lens, loc, tables, mapping = (xp.asarray(each) for each in arrays)
    return Addresses(seq_lens, loc, tables, None, mapping)


def stored(kv: FormattedKV, layer: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """K and V of a block, decoded: [block_size, num_kv_heads, head_size] each."""
    scales = kv.scales.get(layer, (None, None))
    keys, values = (to_host(decode(part[block], its)) for part, its in zip(kv.layers[layer], scales, strict=True))
    return keys, values


def half_step(kv: FormattedKV, layer: int, keys: np.ndarray) -> Any:
    """How far a stored key may be from what was written, and float32's own rounding on top."""
    relative = np.abs(keys) / (256 if kv.device.dtype == FORMATS["bfloat16"] else 16)
    if layer not in kv.scales:
        return relative
    scales = to_host(kv.scales[layer][0])[:, None] * 1.0001
    halves = np.broadcast_to(scales / 2, keys.shape)
    return halves if kv.device.dtype == FORMATS["int8"] else np.maximum(relative, scales * 2**-10)


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_attention_reads_what_was_written_within_the_formats_error(kv_dtype: str) -> None:
    """The error of K and V is at most half a step of the format; the error of attention follows from it."""
    bound = {"bfloat16": 0.02, "int8": 0.05, "float8": 0.3}[kv_dtype]
    plain, small = KVCache(*SIZES, "float32"), FormattedKV(*SIZES, kv_dtype)
    for layer in (0, 1):
        for length, count, blocks in ((7, 7, [3, 0]), (8, 1, [3, 0]), (9, 1, [3, 0, 5])):
            query, key, value = numbers(10 * layer + length, count)
            where = addresses(length, count, blocks)
            wanted, got = (kv.attend(layer, query, key, value, where, None) for kv in (plain, small))
            assert float(abs(got - wanted).max()) <= bound
            for block in blocks:
                held = to_host(plain.layers[layer][0][block])
                error = np.abs(stored(small, layer, block)[0] - held)
                written = ~np.isnan(held)
                assert (error[written] <= half_step(small, layer, held)[written]).all()


@pytest.mark.parametrize("kv_dtype", SCALED)
def test_scales_are_measured_once_for_each_layer(kv_dtype: str) -> None:
    kv = FormattedKV(*SIZES, kv_dtype)
    for layer in (1, 0):
        query, key, value = numbers(layer, 4, size=1 + layer)
        kv.attend(layer, query, key, value, addresses(4, 4, [2]), None)
        for scales, new in zip(kv.scales[layer], (key, value), strict=True):
            np.testing.assert_allclose(to_host(scales), HEADROOM * to_host(choose_scales(new, FORMATS[kv_dtype])))
    measured = {layer: [to_host(part).copy() for part in scales] for layer, scales in kv.scales.items()}
    assert not np.array_equal(measured[0][0], measured[1][0])
    query, key, value = numbers(5, 1, size=100)  # far larger than the first numbers
    kv.attend(0, query, key, value, addresses(5, 1, [2, 4]), None)
    for layer, scales in measured.items():
        np.testing.assert_array_equal([to_host(part) for part in kv.scales[layer]], scales)
    keys, _ = stored(kv, 0, 4)
    limit = 127 if kv_dtype == "int8" else 448
    largest = to_host(kv.scales[0][0])[:, None] * np.float32(limit)
    np.testing.assert_allclose(keys[0], np.clip(to_host(key)[0], -largest, largest), rtol=0.07)  # they saturate
    assert (np.abs(to_host(key)[0]) > largest).any()


@pytest.mark.parametrize("kv_dtype", SCALED)
def test_given_scales_are_used_as_they_are(kv_dtype: str) -> None:
    scales = [tuple(xp.asarray(np.array([0.02 + i, 0.05 + i], np.float32)) for i in range(2)) for _ in range(2)]
    kv = FormattedKV(*SIZES, kv_dtype, scales=scales)
    query, key, value = numbers(3, 4)
    kv.attend(1, query, key, value, addresses(4, 4, [1]), None)
    assert kv.scales == dict(enumerate(scales))
    error = np.abs(stored(kv, 1, 1)[0] - to_host(key))
    assert (error <= np.maximum(to_host(scales[1][0])[:, None], np.abs(to_host(key)) / 16)).all()


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_transfers_move_the_bits(kv_dtype: str) -> None:
    kv = FormattedKV(*SIZES, kv_dtype, num_host_blocks=2)
    for layer in (0, 1):
        query, key, value = numbers(layer, 8)
        kv.attend(layer, query, key, value, addresses(8, 8, [2, 4]), None)
    before = to_host(kv.device).copy()
    kv.apply([Transfer("copy", 2, 0), Transfer("swap_out", 4, 1), Transfer("swap_in", 1, 5), Transfer("move", 4, 1)])
    after = to_host(kv.device)
    for source, destination in ((2, 0), (4, 5), (4, 1)):
        np.testing.assert_array_equal(after[:, :, destination], before[:, :, source])


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_dtype is 'int4'; known are bfloat16, int8, float8"):
        FormattedKV(*SIZES, "int4")
    with pytest.raises(ValueError, match="kv_dtype is 'int4'; known are"):
        LLM("tiny", kv_dtype="int4")


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_slots_that_were_never_written_read_as_nan_where_the_format_has_one(kv_dtype: str) -> None:
    kv = FormattedKV(*SIZES, kv_dtype)
    fresh = to_host(decode(kv.layers[0][0]))
    assert (fresh == 0).all() if kv_dtype == "int8" else np.isnan(fresh).all()


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_a_backend_that_cannot_read_the_format_is_refused_when_the_llm_is_made(kv_dtype: str) -> None:
    message = f"kv_dtype is '{kv_dtype}', and backend 'cpu' cannot run this call: .*; .*reference can"
    with pytest.raises(ValueError, match=message):
        LLM("tiny", kv_dtype=kv_dtype, backend="cpu")
    LLM("tiny", kv_dtype=kv_dtype, backend="reference", manager="standard")


def test_a_format_is_named_as_it_was_given() -> None:
    with pytest.raises(ValueError, match="kv_dtype is 'fp8', and backend 'cpu' cannot run this call"):
        LLM("tiny", kv_dtype="fp8", backend="cpu")
    with pytest.raises(ValueError, match="kv_dtype is 'fp8_e4m3', and device_blocks is 4"):
        LLM("tiny", kv_dtype="fp8_e4m3", device_blocks=4)
    with pytest.raises(ValueError, match="kv_dtype is 'fp9'; known are float32, bfloat16, int8, float8, fp8, fp8_e4m3"):
        LLM("tiny", kv_dtype="fp9")


def test_scales_by_the_name_of_vllm_measured_once_and_given_again() -> None:
    first = LLM("tiny", kv_dtype="fp8")
    wanted = first.generate(PROMPTS, GREEDY)
    kv = first.engine.kv
    assert isinstance(kv, FormattedKV)
    assert kv.device.dtype == FORMATS["float8"]
    again = LLM("tiny", kv_dtype="fp8_e4m3", kv_scales=kv.scales)
    again.generate("Another text comes first.", GREEDY)
    assert [o.outputs[0].token_ids for o in again.generate(PROMPTS, GREEDY)] == [o.outputs[0].token_ids for o in wanted]
    assert isinstance(again.engine.kv, FormattedKV)
    for layer, pair in kv.scales.items():
        for mine, its in zip(again.engine.kv.scales[layer], pair, strict=True):
            np.testing.assert_array_equal(to_host(mine), to_host(its))
    one = LLM("tiny", kv_dtype="int8", kv_scales=[(0.1, [0.2, 0.3])] * 5)
    assert isinstance(one.engine.kv, FormattedKV)
    assert [to_host(part).tolist() for part in one.engine.kv.scales[4]] == [
        pytest.approx([0.1, 0.1]), pytest.approx([0.2, 0.3])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_scales": []}, "kv_scales are given, and kv_dtype is None; only int8 and float8 have scales"),
        ({"kv_dtype": "bfloat16", "kv_scales": [(1, 1)] * 5}, "kv_scales are given, and kv_dtype is 'bfloat16'"),
        ({"kv_dtype": "int8", "kv_scales": [(1, 1)] * 4}, "kv_scales is .*; a pair for each of the 5 layers is needed"),
        ({"kv_dtype": "int8", "kv_scales": 1.0}, r"kv_scales is 1\.0; a pair for each of the 5 layers is needed"),
        ({"kv_dtype": "int8", "kv_scales": {0: (1, 1)}}, "kv_scales is .*; a pair for each of the 5 layers"),
        ({"kv_dtype": "int8", "kv_scales": [1] * 5}, "kv_scales of layer 0 is 1; a pair for K and V is needed"),
        ({"kv_dtype": "int8", "kv_scales": [(1, 0)] * 5}, "kv_scales of layer 0 holds 0; a number above 0, or one for"),
        ({"kv_dtype": "int8", "kv_scales": [(1, "x")] * 5}, "kv_scales of layer 0 holds 'x'; a number above 0"),
        (
            {"kv_dtype": "int8", "kv_scales": [([1, 2, 3], 1)] * 5},
            r"holds \[1, 2, 3\]; .* of the 2 KV heads, is needed",
        ),
        ({"kv_dtype": "int8", "device_blocks": 8}, "kv_dtype is 'int8', and device_blocks is 8; the two do not go"),
        ({"kv_dtype": 8}, "kv_dtype is 8; known are float32, bfloat16, int8, float8, fp8, fp8_e4m3"),
        ({"kv_dtype": ["int8"]}, "known are float32, bfloat16"),
    ],
    ids=str,
)
def test_what_does_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM("tiny", **options)


# --- in the engine ---------------------------------------------------------------------------------------


@cache
def plain_run() -> Run:
    """The same requests with float32 in the cache."""
    return Engine(kv_cache_tokens=1024).run(PROMPTS, GREEDY)


@cache
def paged_run(kv_dtype: str) -> Run:
    return Engine(kv_cache_tokens=1024, kv_dtype=kv_dtype).run(PROMPTS, GREEDY)


def assert_close_to_float32(run: Run, kv_dtype: str) -> None:
    """Logits after the same tokens are within the bound, and the first prompt's text, known by heart, is the same."""
    plain = plain_run()
    for mine, wanted in zip(run.logits, plain.logits, strict=True):
        common = mine.keys() & wanted.keys()
        assert len(common) >= 8
        assert max(float(np.abs(mine[tokens] - wanted[tokens]).max()) for tokens in common) <= BOUNDS[kv_dtype]
    assert run.outputs[0].outputs[0].text == plain.outputs[0].outputs[0].text
    assert run.outputs[0].outputs[0].text.startswith(" fathers brought forth, on this continent, a new nation")


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_greedy_text_and_logits_of_the_embedded_model(kv_dtype: str) -> None:
    engine = Engine(kv_cache_tokens=1024, kv_dtype=kv_dtype)
    kv = engine.llm.engine.kv
    assert isinstance(kv, SanitizedKV)
    assert isinstance(kv.inner, FormattedKV)
    assert kv.inner.device.dtype == FORMATS[kv_dtype]
    run = engine.run(PROMPTS, GREEDY)
    assert_close_to_float32(run, kv_dtype)
    assert any((a[t] != b[t]).any() for a, b in zip(run.logits, plain_run().logits, strict=True) for t in a.keys() & b)
    assert set(kv.inner.scales) == (set(range(engine.llm.config.num_layers)) if kv_dtype in SCALED else set())


@pytest.mark.parametrize(
    "options",
    [{"manager": "standard", "reserve": "exact"}, {"manager": "swapping"}, {"block_size": 4}, {"block_size": 1}],
    ids=str,
)
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_the_manager_changes_no_token(kv_dtype: str, options: dict[str, Any]) -> None:
    run = Engine(kv_cache_tokens=1024, kv_dtype=kv_dtype, **options).run(PROMPTS, GREEDY)
    assert run.tokens == paged_run(kv_dtype).tokens


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 4, "kv_cache_tokens": 80, "preemption": "swap"},
        {"manager": "swapping", "kv_cache_tokens": 80},
        {"block_size": 4, "kv_cache_tokens": 80, "preemption": "recompute"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_in_a_pool_that_is_too_small(kv_dtype: str, options: dict[str, Any]) -> None:
    run = Engine(kv_dtype=kv_dtype, **options).run(PROMPTS, GREEDY)
    assert run.num_preemptions > 0
    assert (min(run.transfers["swap_out"], run.transfers["swap_in"]) > 0) == (options.get("preemption") != "recompute")
    assert_close_to_float32(run, kv_dtype)


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_copies_on_write(kv_dtype: str) -> None:
    """Blocks of one token are never copied; the steps are the same, so the tokens are too."""
    params = SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=2, ignore_eos=True)
    copied, plain = (Engine(kv_dtype=kv_dtype, block_size=size).run([PAPER], params) for size in (4, 1))
    assert (copied.transfers["copy"] > 0, plain.transfers["copy"]) == (True, 0)
    assert copied.tokens == plain.tokens
    assert len(set(map(tuple, copied.tokens[0]))) == 3


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_random_requests_that_share_beginnings(kv_dtype: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefix cache, swaps, recomputation and copies on write at random, watched by the sanitizer, against contiguous
    memory with room for all. With the same scales, the stored bits are the same.

    All products are the loop's, which gives a row the same bits in any company. BLAS does not, and rounding to few
    bits would turn a difference in the last bit into another token, once in thousands of tokens.
    """
    monkeypatch.setattr(linear, "FEW", 1 << 20)
    rng = np.random.default_rng(seed)
    scales = None if kv_dtype == "bfloat16" else [(0.05, 0.05)] * 5
    beginning = rng.integers(5, 2000, 14).tolist()
    prompts = [beginning[: rng.integers(1, 15)] + rng.integers(5, 2000, rng.integers(1, 6)).tolist() for _ in range(5)]
    params = [
        SamplingParams(max_tokens=int(rng.integers(2, 9)), n=n, temperature=0.9, seed=seed, ignore_eos=True)
        for n in rng.integers(1, 4, len(prompts)).tolist()
    ]
    wanted = Engine(kv_dtype=kv_dtype, kv_scales=scales, manager="standard").run(prompts, params)
    preemption = ("swap", "recompute")[seed % 2]
    engine = Engine(
        kv_dtype=kv_dtype, kv_scales=scales, block_size=4, kv_cache_tokens=80, watermark=0, prefix_cache=True,
        preemption=preemption, max_batch_tokens=24,
    )  # fmt: skip
    for _ in range(2):
        run = engine.run(prompts, params)
        assert run.tokens == wanted.tokens


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_bytes_of_the_cache_hold_more_tokens(kv_dtype: str) -> None:
    size = 128 * kv_bytes_per_token(LLM("tiny").config, "float32")
    more = 4 // FORMATS[kv_dtype].itemsize
    assert LLM("tiny", kv_cache_bytes=size, kv_dtype=kv_dtype).engine.manager.num_slots == 128 * more
