"""The core's LLM on real checkpoints: text in, text out, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.model_backends import of_models

from paged_ref.core.engine.llm import LLM
from paged_ref.core.engine.outputs import RequestOutput
from paged_ref.core.engine.sampling import SamplingParams
from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.core.memory.manager import KVCacheManager
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.standard import StandardManager
from paged_ref.extras.swapping import SwappingManager

BACKENDS = of_models("reference", "cpu", "cuda")
PAPER = "Four score and seven years ago our"
MIXED = [PAPER, "Once upon a time", "The cat", "One day, Ben found a red box under the tree. " * 4]


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


@pytest.fixture(scope="module")
def tiny() -> LLM:
    return LLM("tiny")


def managers() -> dict[str, KVCacheManager]:
    return {
        "standard": StandardManager(2048, 512),
        "pow2": StandardManager(512, 512, "pow2"),
        "swapping": SwappingManager(512),
        "one": PagedManager(BlockPool(2048), 1),
        "shuffled": PagedManager(BlockPool(256, [(7 * i) % 256 for i in range(256)]), 16),
        "small": PagedManager(BlockPool(24), 4),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", managers())
def test_same_tokens_whatever_the_memory(tiny: LLM, name: str, backend: str) -> None:
    params = [SamplingParams(max_tokens=n) for n in (40, 30, 20, 10)]
    alone = [tiny.generate(prompt, each)[0] for prompt, each in zip(MIXED, params, strict=True)]
    llm = LLM("tiny", backend=backend, manager=managers()[name], max_batch_tokens=61)
    together = llm.generate(MIXED, params)
    assert ids(together) == ids(alone)
    assert (sum(output.num_preemptions for output in together) > 0) == (name == "small")
    llm.engine.manager.check_integrity()
    assert llm.engine.manager.snapshot().free == llm.engine.manager.num_slots


@pytest.mark.parametrize("backend", BACKENDS)
def test_stories260k_writes_its_published_text(stories260k: Path, backend: str) -> None:
    from paged_ref.core.engine.engine import Engine
    from paged_ref.core.engine.scheduler import Scheduler
    from paged_ref.core.memory.kv import KVCache
    from paged_ref.interop.architectures import build_model
    from paged_ref.interop.checkpoints import load

    expected = (stories260k / "expected_greedy_200.txt").read_text(encoding="utf-8")
    checkpoint, manager = load(stories260k), PagedManager(BlockPool(64), 16)
    config = checkpoint.config
    kv = KVCache(config.num_layers, 64, 16, config.num_kv_heads, config.head_size, "float32", backend=backend)
    llm = LLM.__new__(LLM)
    model = build_model(config, checkpoint.weights)
    llm.open(Engine(model, kv, Scheduler(manager), config.eos_token_ids), config, checkpoint.tokenizer, 512)
    (output,) = llm.generate("", SamplingParams(max_tokens=200))
    assert output.outputs[0].text == expected
    assert len(output.outputs[0].token_ids) == 200
    assert manager.snapshot().free == manager.num_slots


def test_the_papers_figure_6_on_the_real_model() -> None:
    """The prompt lies in blocks 7 and 1, "fathers" fills block 1, "brought" opens block 3."""
    llm = LLM("tiny", manager=PagedManager(BlockPool(9, [7, 1, 3, 0, 2, 4, 5, 6, 8]), 4))
    llm.add_request(PAPER, SamplingParams(max_tokens=4))
    tables, words = [], []
    for _ in range(3):
        (token,) = llm.step()
        words.append(token.text.strip())
        tables.append(llm.engine.manager.placement(0).copy())
    assert tables == [[7, 1], [7, 1], [7, 1, 3]]
    assert words == ["fathers", "brought", "forth"]


@pytest.mark.parametrize("name", ["one", "standard"])
def test_a_seeded_sample_does_not_depend_on_the_batch(name: str) -> None:
    def params(seed: int, n: int = 1) -> SamplingParams:
        return SamplingParams(max_tokens=25, temperature=0.9, top_p=0.95, seed=seed, n=n)

    llm = LLM("tiny", manager=managers()[name])
    (alone,) = llm.generate("Once upon a time", params(3))
    batch = llm.generate(["The cat", "Once upon a time", "Tom"], [params(9), params(3), params(11)])
    assert ids([batch[1]]) == ids([alone])
    (samples,) = llm.generate("Once upon a time", params(2, n=4))
    singles = [llm.generate("Once upon a time", params(2 + i))[0] for i in range(4)]
    assert ids([samples]) == ids(singles)
    assert len(set(map(tuple, ids([samples])))) > 1
    assert llm.engine.manager.snapshot().free == llm.engine.manager.num_slots


def test_samples_share_the_blocks_of_their_prompt() -> None:
    llm = LLM("tiny", block_size=4)
    llm.add_request(PAPER, SamplingParams(max_tokens=8, temperature=1.0, seed=0, n=3))
    manager = llm.engine.manager
    llm.step()  # the prompt, then three samples begin
    assert manager.snapshot().shared == 2 * 8  # two more tables of two blocks each
    llm.step()  # each writes its own token: the last block is copied for all but one
    assert manager.snapshot().shared == 2 * 4
    while llm.engine.requests:
        llm.step()
        manager.check_integrity()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([1, 5000], {}, r"token id 5000; known are 0 to \d+$"),
        ([-1], {}, "token id -1"),
        ([5] * 512, {}, "512 tokens; the context of 512"),
    ],
)
def test_a_request_that_is_refused_disturbs_no_other(
    tiny: LLM, prompt: Any, options: dict[str, Any], message: str
) -> None:
    request_id = tiny.add_request(PAPER, SamplingParams(max_tokens=3))
    keep = tiny.engine.requests[request_id].output
    with pytest.raises(ValueError, match=message):
        tiny.add_request(prompt, SamplingParams(**options))
    while tiny.engine.requests:
        tiny.step()
    assert keep.outputs[0].text == " fathers brought forth"
    if not options:
        with pytest.raises(ValueError, match=message):
            tiny.generate([PAPER, prompt])
        assert not tiny.engine.requests


def test_a_prompt_that_the_cache_can_never_hold() -> None:
    llm = LLM("tiny", kv_cache_tokens=64)
    with pytest.raises(ValueError, match=r"70 tokens; the context of 64 .* own is 512; .* holds 64"):
        llm.generate([5] * 70)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size is 0; at least 1"),
        ({"block_size": -4}, "block_size is -4; at least 1"),
        ({"kv_cache_tokens": 10}, "num_blocks is 0; at least 1"),
        ({"max_batch_tokens": 0}, "max_batch_tokens is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'; known are float16, float32"),
    ],
)
def test_engines_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM("tiny", **options)


def test_params_for_each_prompt_must_match(tiny: LLM) -> None:
    with pytest.raises(ValueError, match="params has length 1, and prompts 2"):
        tiny.generate(["a", "b"], [SamplingParams()])
    assert not tiny.engine.requests
