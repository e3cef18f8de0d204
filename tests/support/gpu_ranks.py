"""Run as a script on the strict stand-in for a GPU: two ranks give the tokens of one process, with swaps and forks."""

from __future__ import annotations

from paged_ref import LLM, SamplingParams
from paged_ref.core import device
from paged_ref.lesson.rank_threads import threads
from paged_ref.tuned.decoder import FusedDecoder
from paged_ref.tuned.kv import TunedKV

PARAMS = SamplingParams(max_tokens=4, n=2, temperature=0.5, seed=1, ignore_eos=True)
OPTIONS = {"block_size": 4, "kv_cache_tokens": 40, "preemption": "swap", "backend": "reference"}


def tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(["Once upon a time", "The little dog"], PARAMS)
    return [sample.token_ids for output in outputs for sample in output.outputs]


if __name__ == "__main__":
    assert device.on_gpu
    expected = tokens(LLM("tiny", **OPTIONS))  # type: ignore[arg-type]
    with threads(2, lambda group: LLM("tiny", group=group, **OPTIONS)) as llms:  # type: ignore[arg-type]
        assert tokens(llms[0]) == expected
        for llm in llms:
            assert isinstance(llm.engine.model, FusedDecoder)
            assert isinstance(llm.engine.kv, TunedKV)
    print("the same tokens")
