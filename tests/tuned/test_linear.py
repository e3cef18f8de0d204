"""Products of a few rows give what NumPy gives, for every number of rows and threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paged_ref import LLM, SamplingParams
from paged_ref.bench.engine import CONFIG
from paged_ref.bench.random_model import save_checkpoint
from paged_ref.core.model.llama import linear as plain_linear
from paged_ref.interop.architectures import random_weights
from paged_ref.tuned import linear, threads


@pytest.fixture(params=[1, 3])
def num_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(linear, "PARALLEL", 0)  # small products, too
    monkeypatch.setattr(linear, "num_threads", lambda: request.param)
    monkeypatch.setattr(threads, "num_threads", lambda: request.param)
    threads._pool.cache_clear()
    yield request.param
    threads._pool.cache_clear()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 13, linear.FEW, linear.FEW + 1, 40])
@pytest.mark.parametrize(("out", "size"), [(1, 5), (15, 48), (17, 16), (25, 33), (96, 112)])
def test_the_answer_is_numpys(num_threads: int, rows: int, out: int, size: int) -> None:
    rng = np.random.default_rng(rows)
    x, weight = (rng.standard_normal((n, size), np.float32) for n in (rows, out))
    y = linear.linear(x, weight)
    assert y.shape == (rows, out)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight.T.astype(np.float64), rtol=1e-5, atol=5e-5)
    assert plain_linear(x, weight).shape == y.shape


@pytest.mark.parametrize("large", [0, linear.LARGE])
def test_a_row_has_the_same_bits_among_any_few_rows(
    num_threads: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "LARGE", large)
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal((n, 112), np.float32) for n in (linear.FEW, 61))  # by the loop
    whole = linear.linear(x, weight)
    for rows in range(1, linear.FEW):
        np.testing.assert_array_equal(linear.linear(x[:rows], weight), whole[:rows])


def test_arrays_in_pieces_or_read_only_and_other_dtypes(num_threads: int) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((4, 64), np.float32), rng.standard_normal((20, 32), np.float32)
    np.testing.assert_allclose(linear.linear(x[:, ::2], weight), x[:, ::2] @ weight.T, atol=1e-5)
    whole = x[:, ::2].copy()
    for array in (whole, weight):
        array.flags.writeable = False
        np.testing.assert_allclose(linear.linear(whole, weight), whole @ weight.T, atol=1e-5)
    for dtype in (np.float16, np.float64):
        assert linear.linear(x[:, ::2].astype(dtype), weight.astype(dtype)).dtype == dtype


def test_nan_stays_in_its_row(num_threads: int) -> None:
    x, weight = np.ones((5, 32), np.float32), np.ones((10, 32), np.float32)
    x[3, 7] = np.nan
    y = linear.linear(x, weight)
    assert np.isnan(y[3]).all()
    assert (np.delete(y, 3, axis=0) == 32).all()


def test_product_is_numpys_in_parts_too(num_threads: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((50, 40), np.float32), rng.standard_normal((40, 30), np.float32)
    np.testing.assert_allclose(linear.product(a, b), a @ b, atol=1e-4)
    np.testing.assert_allclose(linear.product(b.T, a.T), b.T @ a.T, atol=1e-4)


def test_the_public_llm_computes_with_it_and_gives_the_same_tokens(tmp_path: Path) -> None:
    small = replace(
        CONFIG, num_layers=1, sliding_windows=(None,), hidden_size=96, num_heads=2, num_kv_heads=2, vocab_size=4096
    )
    save_checkpoint(tmp_path, small, random_weights(small))
    llm = LLM(tmp_path, kv_cache_tokens=256)
    prompts = [[5, 6, 7 + i] for i in range(3)]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    fast = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    assert llm.engine.model.linear is linear.linear
    llm.engine.model.linear = plain_linear
    assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == fast
