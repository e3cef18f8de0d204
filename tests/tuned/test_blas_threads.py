"""One BLAS thread for small products; a number of threads that the environment names is left alone."""

from __future__ import annotations

import pytest
from threadpoolctl import ThreadpoolController

from paged_ref import LLM, SamplingParams
from paged_ref.core.model.config import ModelConfig
from paged_ref.tuned import blas_threads


def config(hidden_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=64, hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_layers=1, num_heads=2,
        num_kv_heads=2, head_size=16, max_position_embeddings=64,
    )  # fmt: skip


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> ThreadpoolController:
    for name in blas_threads.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return ThreadpoolController().select(user_api="blas")


def threads(blas: ThreadpoolController) -> list[int]:
    return [library.get_num_threads() for library in blas.lib_controllers]


def test_small_products_have_one_thread_and_others_their_own(two_threads: ThreadpoolController) -> None:
    with two_threads.limit(limits=2):
        before = threads(two_threads)
        with blas_threads.limit_for(config(128))():
            assert set(threads(two_threads)) == {1}
        assert threads(two_threads) == before
        with blas_threads.limit_for(config(1024))():
            assert threads(two_threads) == before


@pytest.mark.parametrize("name", blas_threads.SETTINGS)
def test_the_environment_decides(two_threads: ThreadpoolController, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with two_threads.limit(limits=2), blas_threads.limit_for(config(128))():
        assert set(threads(two_threads)) == {2}


def test_a_step_of_the_embedded_model_has_one_thread(two_threads: ThreadpoolController) -> None:
    seen: list[list[int]] = []

    def hook(tokens: object, logits: object) -> object:
        seen.append(threads(two_threads))
        return logits

    with two_threads.limit(limits=2):
        LLM().generate("Once", SamplingParams(max_tokens=2, logits_hook=hook))  # type: ignore[arg-type]
        assert set(threads(two_threads)) == {2}
    assert {number for each in seen for number in each} == {1}
