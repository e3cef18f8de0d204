"""The whole path on real checkpoints: text in, text out, and what is refused."""

from __future__ import annotations

import inspect
import itertools
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.model_backends import of_models

from paged_ref import LLM, RequestOutput, SamplingParams
from paged_ref.core.model.config import kv_bytes_per_token
from paged_ref.core.model.loading import TINY
from paged_ref.interop.checkpoints import load

BACKENDS = of_models("reference", "cpu", "cpu-simd", "cuda", "cuda-flash")
BYTES_PER_TOKEN = kv_bytes_per_token(load("tiny").config, "float32")
PAPER = "Four score and seven years ago our"
MIXED = [PAPER, "Once upon a time", "The cat", "One day, Ben found a red box under the tree. " * 4]


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


@pytest.fixture(scope="module")
def tiny() -> LLM:
    return LLM("tiny")


# --- golden text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("manager", "block_size"),
    [
        ("standard", 16), ("paged", 4), ("paged", 16),
        pytest.param("paged", 1, marks=pytest.mark.slow), pytest.param("paged", 64, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_stories260k_writes_its_published_text(stories260k: Path, manager: Any, block_size: int, backend: str) -> None:
    expected = (stories260k / "expected_greedy_200.txt").read_text(encoding="utf-8")
    llm = LLM(stories260k, manager=manager, block_size=block_size, backend=backend, kv_cache_tokens=1024)
    (output,) = llm.generate("", SamplingParams(max_tokens=200))
    assert output.outputs[0].text == expected
    assert len(output.outputs[0].token_ids) == 200
    llm.engine.manager.check_integrity()
    assert llm.engine.manager.snapshot().free == llm.engine.manager.num_slots


def test_the_papers_sentence_is_ten_tokens_and_the_model_knows_it(tiny: LLM) -> None:
    sentence = "Four score and seven years ago our fathers brought forth"
    assert [tiny.tokenizer.decode([i]).strip() for i in tiny.tokenizer.encode(sentence)] == sentence.split()
    (output,) = tiny.generate(PAPER, SamplingParams(max_tokens=3))
    assert output.outputs[0].text == " fathers brought forth"


def test_the_papers_figure_6_on_the_real_model() -> None:
    """The prompt lies in blocks 7 and 1, "fathers" fills block 1, "brought" opens block 3."""
    llm = LLM("tiny", block_size=4, kv_cache_tokens=36, free_order=[7, 1, 3, 0, 2, 4, 5, 6, 8])
    llm.add_request(PAPER, SamplingParams(max_tokens=4))
    tables, words = [], []
    for _ in range(3):
        (token,) = llm.step()
        words.append(token.text.strip())
        tables.append(list(llm.engine.manager.placement(0)))
    assert tables == [[7, 1], [7, 1], [7, 1, 3]]
    assert words == ["fathers", "brought", "forth"]


# --- the batch never changes a token -------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"manager": "standard"},
        pytest.param({"manager": "standard", "reserve": "pow2", "kv_cache_tokens": 512}, marks=pytest.mark.slow),
        pytest.param({"manager": "paged", "block_size": 1}, marks=pytest.mark.slow),
        {"manager": "paged", "block_size": 5, "max_batch_tokens": 7},  # chunks and decodes in one step
        {"manager": "paged", "block_size": 4, "kv_cache_tokens": 96},  # too little for all: preemptions
        {"manager": "paged", "free_order": [(7 * i) % 256 for i in range(256)]},
    ],
    ids=str,
)
def test_same_tokens_whatever_the_memory(tiny: LLM, options: dict[str, Any], backend: str) -> None:
    params = [SamplingParams(max_tokens=n) for n in (40, 30, 20, 10)]
    alone = [tiny.generate(prompt, its)[0] for prompt, its in zip(MIXED, params, strict=True)]
    llm = LLM("tiny", backend=backend, **options)
    together = llm.generate(MIXED, params)
    assert ids(together) == ids(alone)
    assert (sum(output.num_preemptions for output in together) > 0) == (options.get("kv_cache_tokens") == 96)
    llm.engine.manager.check_integrity()
    assert llm.engine.manager.snapshot().free == llm.engine.manager.num_slots


@pytest.mark.parametrize("manager", ["paged", "standard"])
def test_a_seeded_sample_does_not_depend_on_the_batch(manager: Any) -> None:
    def params(seed: int, n: int = 1) -> SamplingParams:
        return SamplingParams(max_tokens=25, temperature=0.9, top_p=0.95, seed=seed, n=n)

    llm = LLM("tiny", manager=manager, kv_cache_tokens=512 * 4)
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
    llm.step()  # the prompt, then three samples begin
    assert llm.engine.manager.snapshot().shared == 2 * 8  # two more tables of two blocks each
    llm.step()  # each writes its own token: the last block is copied for all but one
    assert llm.engine.manager.snapshot().shared == 2 * 4
    while llm.has_unfinished:
        llm.step()
        llm.engine.manager.check_integrity()


# --- ends ----------------------------------------------------------------------------------------------


def test_finish_reasons(tiny: LLM) -> None:
    (output,) = tiny.generate(PAPER, SamplingParams(max_tokens=5))
    assert (output.outputs[0].finish_reason, len(output.outputs[0].token_ids)) == ("length", 5)
    (output,) = tiny.generate(PAPER, SamplingParams(max_tokens=50, stop="forth"))
    assert (output.outputs[0].finish_reason, output.outputs[0].text) == ("stop", " fathers brought ")
    forth = tiny.tokenizer.encode(" forth")[0]
    (output,) = tiny.generate(PAPER, SamplingParams(max_tokens=50, stop_token_ids=[forth]))
    assert (output.outputs[0].finish_reason, output.outputs[0].text) == ("stop", " fathers brought")
    assert output.outputs[0].token_ids[-1] == forth


def test_the_context_ends_a_request() -> None:
    llm = LLM("tiny", max_model_len=12)
    (output,) = llm.generate(PAPER, SamplingParams(max_tokens=100))
    assert (output.outputs[0].finish_reason, len(output.outputs[0].token_ids)) == ("length", 5)


def test_leaving_a_stream_frees_everything(tiny: LLM) -> None:
    for token in itertools.islice(tiny.stream(MIXED, SamplingParams(max_tokens=50)), 6):
        assert token.finish_reason is None
    # The generator is dropped here, half way.
    assert not tiny.has_unfinished
    assert tiny.engine.manager.snapshot().free == tiny.engine.manager.num_slots


def test_a_callback_that_raises_leaves_nothing_behind_and_spares_the_others(tiny: LLM) -> None:
    def explode(token: object) -> None:
        raise RuntimeError("from the callback")

    other = tiny.add_request("The cat", SamplingParams(max_tokens=20))
    output = tiny.output_of(other)
    with pytest.raises(RuntimeError, match="from the callback"):
        tiny.generate(MIXED, SamplingParams(max_tokens=20), on_token=explode)
    while tiny.has_unfinished:
        tiny.step()
    assert ids([output]) == ids(tiny.generate("The cat", SamplingParams(max_tokens=20)))
    assert tiny.engine.manager.snapshot().free == tiny.engine.manager.num_slots


def test_abort_in_the_middle(tiny: LLM) -> None:
    keep = tiny.add_request(PAPER, SamplingParams(max_tokens=6))
    drop = tiny.add_request("Once upon a time", SamplingParams(max_tokens=50, n=2, temperature=1.0))
    queued = tiny.output_of(drop)
    output = tiny.output_of(keep)
    tiny.step()
    tiny.abort(drop)
    tiny.abort(drop)  # a second time does nothing
    assert [sample.finish_reason for sample in queued.outputs] == ["abort", "abort"]
    while tiny.has_unfinished:
        tiny.step()
    assert output.outputs[0].text.startswith(" fathers brought forth")
    assert tiny.engine.manager.snapshot().free == tiny.engine.manager.num_slots


# --- refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([1, 5000], {}, r"token id 5000; known are 0 to \d+$"),
        ([-1], {}, "token id -1"),
        ([5] * 512, {}, "512 tokens; the context of 512"),
        ("Once", {"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_a_request_that_is_refused_disturbs_no_other(
    tiny: LLM, prompt: Any, options: dict[str, Any], message: str
) -> None:
    keep = tiny.output_of(tiny.add_request(PAPER, SamplingParams(max_tokens=3)))
    with pytest.raises(ValueError, match=message):
        tiny.add_request(prompt, SamplingParams(**options))
    while tiny.has_unfinished:
        tiny.step()
    assert keep.outputs[0].text == " fathers brought forth"
    if not options:
        with pytest.raises(ValueError, match=message):
            tiny.generate([PAPER, prompt])
        assert not tiny.has_unfinished


def test_a_request_that_the_cache_can_never_hold() -> None:
    llm = LLM("tiny", kv_cache_tokens=64, max_model_len=512)
    with pytest.raises(ValueError, match=r"a prompt of length 70 .* 64"):
        llm.generate([5] * 70)
    llm = LLM("tiny", kv_cache_tokens=64)
    with pytest.raises(ValueError, match=r"70 tokens; the context of 64 .* own is 512; .* holds 64"):
        llm.generate([5] * 70)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size is 0; at least 1"),
        ({"block_size": -4}, "block_size is -4; at least 1"),
        ({"manager": "buddy"}, "manager is 'buddy'; known are"),
        ({"kv_cache_tokens": 10}, "has 10 slots; at least one block of 16"),
        ({"kv_cache_tokens": 0, "manager": "standard"}, "has 0 slots; at least one block of 1 "),
        ({"kv_cache_bytes": BYTES_PER_TOKEN * 16 - 1}, "has 15 slots; at least one block of 16"),
        ({"kv_cache_bytes": 1, "kv_cache_tokens": 1}, "both given"),
        ({"max_model_len": 513}, "max_model_len is 513; 1 to the model's context of 512"),
        ({"max_batch_tokens": 0}, "max_batch_tokens is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'; known are float16, float32"),
        ({"dtype": "float13"}, "dtype is 'float13'; known are float16, float32"),
        ({"backend": "magic"}, "backend is 'magic'; known are"),
        ({"free_order": [0, 1]}, "free_order"),
        ({"model": "no/such/directory"}, "no/such/directory"),
    ],
)
def test_engines_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(**{"model": "tiny", **options})


def test_bytes_and_tokens_give_the_same_pool() -> None:
    assert LLM("tiny", kv_cache_bytes=BYTES_PER_TOKEN * 100).engine.manager.num_slots == 96
    assert LLM("tiny", kv_cache_tokens=100).engine.manager.num_slots == 96


def test_params_for_each_prompt_must_match(tiny: LLM) -> None:
    with pytest.raises(ValueError, match="params has length 1, and prompts 2"):
        tiny.generate(["a", "b"], [SamplingParams()])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv_cache_tokens": "8"}, "kv_cache_tokens is '8'; a whole number is needed"),
        ({"block_size": 1.5}, "block_size is 1.5; a whole number is needed"),
        ({"block_size": True}, "block_size is True; a whole number is needed"),
        ({"max_model_len": 1.5}, "max_model_len is 1.5; a whole number is needed"),
        ({"block_size": None}, "block_size is None; a whole number is needed"),
        ({"max_batch_seqs": None}, "max_batch_seqs is None; a whole number is needed"),
        ({"free_order": 5}, "free_order is 5; block ids are needed"),
        ({"free_order": ["a"]}, "a block in free_order is 'a'; a whole number is needed"),
        ({"watermark": "x"}, "watermark is 'x'; a finite number is needed"),
        ({"watermark": None}, "watermark is None; a finite number is needed"),
        ({"prefix_cache": "yes"}, "prefix_cache is 'yes'; True or False is needed"),
        ({"sanitize": 1}, "sanitize is 1; True or False is needed"),
        ({"beyond_context": None}, "beyond_context is None; True or False is needed"),
        ({"backend": ["cpu"]}, "backend is ['cpu']; a name is needed"),
        ({"attend": [1], "device_blocks": 8}, "attend is [1]; 'all', a budget of at least 1 block"),
        ({"model": 5}, "model is 5; 'tiny' or a directory is needed"),
        ({"log": 5}, "log is 5; a function is needed"),
        ({"on_step": 5}, "on_step is 5; a function is needed"),
        ({"group": 2}, "group is 2; a Group of distributed/group.py is needed"),
        ({"reserve": "most"}, "reserve is 'most'; known are max, pow2, exact"),
        ({"preemption": ""}, "preemption is ''; known are recompute, swap"),
        (
            {"kv_cache_bytes": 10**30},
            "kv_cache_bytes is 1000000000000000000000000000000: a KV cache of this size needs",
        ),
        ({"model": ""}, "model is ''; 'tiny' or a directory is needed"),
        ({"enable_prefix_caching": True}, "LLM has no argument enable_prefix_caching; give prefix_cache"),
        (
            {"tensor_parallel_size": 2},
            "tensor_parallel_size; run `paged-ref generate --tensor-parallel N`, or give group",
        ),
        (
            {"prefix_cach": True},
            "LLM has no argument prefix_cach; known are model, manager, block_size, kv_cache_tokens,",
        ),
    ],
)
def test_arguments_of_a_wrong_type_are_named(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        LLM(**{"model": "tiny", **options})


MEMORY: list[dict[str, Any]] = [{"kv_cache_tokens": 64}, {"device_blocks": 8}]


@pytest.mark.parametrize("name", [name for name in inspect.signature(LLM).parameters if name != "device_blocks"])
def test_no_argument_of_a_wrong_type_ends_in_another_error(name: str) -> None:
    """Whatever is passed: it is taken, or refused by ValueError."""
    for value in (-1, 2.5, "x", b"x", [[1]], {"a": 1}, object(), None, float("nan"), 10**30):
        for more in MEMORY:
            with suppress(ValueError):
                LLM(**{"model": TINY / "nothing", **more, name: value})
            if name in ("watermark", "free_order", "manager", "reserve", "allocator", "attend", "evict", "kv_scales"):
                with suppress(ValueError):  # refused after the model is read
                    LLM(**{**more, "kv_dtype": "int8" if name == "kv_scales" else None, name: value})
