"""Recorded decode steps: here the recorder is one that computes anew; what is filled in and cut off is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from paged_ref import LLM, SamplingParams
from paged_ref.device import on_gpu
from paged_ref.engine.recorded import RecordedDecode, filled_batch, next_power_of_two

PROMPTS = ["Four score and seven years ago our", "Once upon a time", "The", "Lily and Tom went to the park. They"]


def compute_anew(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """As a graph does, into the same array."""
    logits = run()

    def replay() -> None:
        logits[...] = run()

    return replay, logits


@contextmanager
def skipped_where_refused() -> Iterator[None]:
    """CuPy refuses to record cuBLAS: then there is nothing to test, and the reason is shown."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, NotImplementedError):
            pytest.skip(str(error))
        raise


def ids(llm: LLM, *params: SamplingParams) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, list(params))]


@pytest.mark.skipif(on_gpu, reason="a GPU is in use: the real recorder can run")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_recorded_steps_give_the_same_tokens(backend: str) -> None:
    """Sequences that end at different times, so that one recording serves batches of several sizes."""
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (30, 9, 20, 5)]
    want = ids(LLM("tiny", backend=backend, block_size=4), *params)
    llm = LLM("tiny", backend=backend, block_size=4)
    recorded = RecordedDecode(llm.model, compute_anew)
    llm.model = recorded  # type: ignore[assignment]
    assert ids(llm, *params) == want
    assert recorded.num_replays == 29  # all but the first step, in which the prompts are computed
    sizes = {size for size, _ in recorded._steps}
    assert sizes == {1, 2, 4}


def test_sizes_of_recordings() -> None:
    assert [filled_batch(n) for n in (1, 2, 3, 5, 16, 17, 32, 33)] == [1, 2, 4, 8, 16, 32, 32, 48]
    assert [next_power_of_two(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


@pytest.mark.skipif(on_gpu, reason="a GPU is in use")
def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(ValueError, match="cuda_graphs is on; no GPU is in use here: "):
        LLM("tiny", cuda_graphs=True)


@pytest.mark.gpu
def test_cuda_graphs_give_the_same_tokens() -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (30, 9, 20, 5)]
    want = ids(LLM("tiny", block_size=4), *params)
    llm = LLM("tiny", block_size=4, cuda_graphs=True)
    with skipped_where_refused():
        assert ids(llm, *params) == want
    assert ids(llm, *params) == want  # every step replayed
    recorded: Any = llm.model
    assert recorded.num_replays == 2 * 29


@pytest.mark.gpu
def test_a_backend_that_waits_cannot_be_recorded() -> None:
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        LLM("tiny", backend="reference", cuda_graphs=True).generate("Once")


@pytest.mark.gpu
def test_a_decode_step_makes_the_host_wait_for_nothing() -> None:
    """A graph can only be recorded of work that never waits; float16 too, and both CUDA backends."""
    from paged_ref.kernels import backends

    for backend in ("cuda", "cuda-flash"):
        if backend not in backends():
            continue
        for dtype in ("float32", "float16"):
            llm = LLM("tiny", backend=backend, dtype=dtype, cuda_graphs=True)
            with skipped_where_refused():
                (output,) = llm.generate("Four score and seven years ago our", SamplingParams(max_tokens=4))
            assert output.outputs[0].text.startswith(" fathers brought forth")
            assert np.all(np.array(output.outputs[0].token_ids) >= 0)
