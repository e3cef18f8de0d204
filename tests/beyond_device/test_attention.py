"""Attention over blocks of which some are on the host: exact, however they are spread and however little is staged."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.streams import DeviceArray, pretend_gpu, run

from paged_ref.beyond_device.attention import TwoCaches, _Piece, _Stager, streamed_attention
from paged_ref.kernels import paged_attention
from paged_ref.tuned import copies

WAYS = ["tiled", "staged"]


class Spread:
    """Sequences whose blocks lie on the device, on the host or on both, and the same in one cache."""

    def __init__(self, rng: np.random.Generator, seqs: list[tuple[int, int]], block_size: int, heads: tuple[int, int],
                 head_size: int, share: float, num_staging: int, dtype: str = "float32") -> None:  # fmt: skip
        """`seqs`: (keys, queries) of each; `share` of the blocks are on the device."""
        num_heads, num_kv_heads = heads
        self.seq_lens = np.array([keys for keys, _ in seqs])
        self.loc = np.concatenate([[0], np.cumsum([queries for _, queries in seqs])])
        self.query = rng.standard_normal((int(self.loc[-1]), num_heads, head_size)).astype(dtype)
        num_blocks = -(-self.seq_lens // block_size)
        total = int(num_blocks.sum())
        where = rng.choice(3, size=total, p=[share / 2, 1 - share, share / 2])  # device, host, both
        shape = (total, block_size, num_kv_heads, head_size)
        # One array: device blocks, staging blocks, host blocks. What holds no key is NaN, so that a stray read shows.
        whole = [np.full((2 * total + num_staging, *shape[1:]), np.nan, dtype=dtype) for _ in range(2)]
        self.table = np.full((len(seqs), max(int(num_blocks.max()), 1)), -1)
        self.device_tables, self.host_tables = self.table.copy(), self.table.copy()
        self.resident = [rng.standard_normal(shape).astype(dtype) for _ in range(2)]
        device_order, host_order = rng.permutation(total), rng.permutation(total)
        block = 0
        for s, count in enumerate(num_blocks):
            for b in range(count):
                self.table[s, b] = block
                valid = min(block_size, int(self.seq_lens[s]) - b * block_size)
                for cache, resident in zip(whole, self.resident, strict=True):
                    if where[block] != 1:
                        self.device_tables[s, b] = device_order[block]
                        cache[device_order[block], :valid] = resident[block, :valid]
                    if where[block] != 0:
                        self.host_tables[s, b] = host_order[block]
                        cache[total + num_staging + host_order[block], :valid] = resident[block, :valid]
                block += 1
        first_host = total + num_staging
        self.staged = TwoCaches(
            whole[0][:first_host], whole[1][:first_host], whole[0][first_host:], whole[1][first_host:],
            range(total, total + num_staging),
        )  # fmt: skip
        self.tiled = replace(self.staged, staging=range(0), whole=(whole[0], whole[1]))

    def exact(self, dtype: str = "float64", window: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        query, keys, values = (array.astype(dtype) for array in (self.query, *self.resident))
        out, lse = paged_attention(
            query, keys, values, self.table, self.seq_lens, self.loc, return_lse=True, sliding_window=window,
            backend="reference",
        )  # fmt: skip
        return out, lse

    def streamed(self, way: str, backend: str = "auto", window: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        caches = self.tiled if way == "tiled" else self.staged
        return streamed_attention(
            self.query, caches, self.device_tables, self.host_tables, self.seq_lens, self.loc,
            sliding_window=window, backend=backend,
        )  # fmt: skip


@st.composite
def spreads(draw: st.DrawFn) -> Spread:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    seqs = []
    for _ in range(draw(st.integers(1, 4))):
        keys = draw(st.integers(1, 90))
        seqs.append((keys, draw(st.sampled_from([1, 1, min(keys, 3), keys]))))
    num_kv_heads = draw(st.sampled_from([1, 2]))
    heads = (num_kv_heads * draw(st.sampled_from([1, 2, 4])), num_kv_heads)
    return Spread(
        rng, seqs, draw(st.sampled_from([1, 3, 4, 16])), heads,
        draw(st.sampled_from([2, 8, 40])), draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])), draw(st.integers(1, 9)),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(spread=spreads(), backend=st.sampled_from(["cpu", "reference"]))
def test_streamed_attention_is_attention(spread: Spread, backend: str) -> None:
    expected, expected_lse = spread.exact()
    for way in WAYS:
        out, lse = spread.streamed(way, backend)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(spread=spreads(), window=st.integers(1, 40))
def test_a_sliding_window_sees_the_same_or_says_what_it_lacks(spread: Spread, window: int) -> None:
    expected, _ = spread.exact(window=window)
    np.testing.assert_allclose(spread.streamed("tiled", window=window)[0], expected, rtol=0, atol=1e-5)
    num_staging = len(spread.staged.staging)
    begin = np.maximum(0, spread.seq_lens - np.diff(spread.loc) - window + 1) // spread.staged.block_size
    inside = (np.arange(spread.table.shape[1]) >= begin[:, None]) & (spread.table >= 0)
    missing = (inside & (spread.device_tables < 0)).sum(axis=1)  # of each sequence; they take turns
    if missing.max() > num_staging:
        first = int(missing[missing > num_staging][0])
        with pytest.raises(ValueError, match=f"{window} needs {first} blocks.* holds {num_staging}"):
            spread.streamed("staged", "reference", window)
        return
    out, _ = spread.streamed("staged", "reference", window)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_float16_caches(way: str) -> None:
    spread = Spread(np.random.default_rng(3), [(70, 1), (41, 5)], 16, (4, 2), 16, 0.4, 2, "float16")
    expected, _ = spread.exact()
    np.testing.assert_allclose(spread.streamed(way)[0], expected, rtol=0, atol=2e-3)


def test_every_piece_stays_within_its_half_of_the_staging_blocks() -> None:
    """Counted at the copies: no staging block is written before the piece that was in it is computed."""
    spread = Spread(np.random.default_rng(5), [(300, 1), (200, 2)], 4, (2, 1), 8, 0.2, 6)
    seen = []
    streamed_attention(
        spread.query, spread.staged, spread.device_tables, spread.host_tables, spread.seq_lens, spread.loc,
        check=lambda seqs, table, first, lens: seen.append((seqs, table, first, lens)),
    )  # fmt: skip
    staging = set(spread.staged.staging)
    used = [{int(b) for b in table.ravel()} & staging for _, table, _, _ in seen]
    assert all(len(blocks) <= 3 for blocks in used)
    assert all(not a & b for a, b in pairwise(used))
    keys = np.zeros(2, dtype=int)
    for seqs, _, _, lens in seen:
        keys[seqs] += lens
    assert keys.tolist() == [300, 200]


@pytest.mark.gpu
@pytest.mark.parametrize("num_staging", [1, 2, 8])
def test_on_a_gpu_copies_run_beside_the_kernel(num_staging: int) -> None:
    import cupy
    import cupyx

    spread = Spread(np.random.default_rng(7), [(2000, 1), (700, 1), (90, 9)], 16, (8, 2), 64, 0.3, num_staging)
    hosts = []
    for array in (spread.staged.host_keys, spread.staged.host_values):
        hosts.append(cupyx.empty_pinned(array.shape, array.dtype))
        hosts[-1][:] = array
    keys, values = cupy.asarray(spread.staged.keys), cupy.asarray(spread.staged.values)
    caches = TwoCaches(keys, values, hosts[0], hosts[1], spread.staged.staging)
    expected, expected_lse = spread.exact()
    for _ in range(3):  # a copy that comes too late would show sooner or later
        out, lse = streamed_attention(
            cupy.asarray(spread.query), caches, spread.device_tables, spread.host_tables, spread.seq_lens, spread.loc
        )
        np.testing.assert_allclose(out.get(), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(lse.get(), expected_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_no_half_is_written_while_it_is_read(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging on streams made of Python, in every order that their events allow."""
    compute = pretend_gpu(monkeypatch, copies)
    host = np.arange(12, dtype=np.float32).reshape(12, 1, 1, 1)
    device = np.full((5, 1, 1, 1), np.nan, dtype=np.float32).view(DeviceArray)
    caches = TwoCaches(device, device.copy().view(DeviceArray), host, host + 100, range(1, 5))
    table = np.array([[3, 4, 7, 1, 0, 2, 9, 11, 10, 5]])  # nothing is on the device
    stager = _Stager(caches, halves=2)
    seen: list[float] = []

    def read(blocks: np.ndarray) -> None:
        seen.extend(caches.keys[blocks].ravel().tolist())
        assert (caches.values[blocks] == caches.keys[blocks] + 100).all()

    on_the_way = []
    for begin in range(0, 10, 2):
        piece = _Piece(0, 0, np.array([begin]), np.array([begin + 2]))
        on_the_way.append(stager.fetch(piece, np.full_like(table, -1), table))
        if len(on_the_way) == 2 or begin == 8:
            for blocks, half in on_the_way[: 1 if begin < 8 else 2]:
                stager.wait(half)
                compute.put(partial(read, blocks[0]))
                stager.done(half)
            del on_the_way[0]
    run([compute, caches.copies._stream], random.Random(seed))
    assert seen == table[0].tolist()
