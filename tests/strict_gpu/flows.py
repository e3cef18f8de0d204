"""What the project does, one flow for each capability. A flow returns what must be the same on every device.

PYTHONPATH=src:tests python -m strict_gpu tests/strict_gpu/flows.py [flow ...]      prints JSON, a line for each
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from paged_ref import LLM, RequestOutput, SamplingParams
from paged_ref.core.device import on_gpu
from paged_ref.extras.sanitizer import SanitizerError

PROMPTS = ["Four score and seven years ago our", "Once upon a time", "The cat"]
LONG_PROMPT = "One day, Ben found a red box under the tree. " * 3
QUICK: dict[str, Callable[[], Any]] = {}
SLOW: dict[str, Callable[[], Any]] = {}
SWAPS: dict[str, Any] = {"block_size": 4, "kv_cache_tokens": 48, "watermark": 0, "preemption": "swap"}


def flow(into: dict[str, Callable[[], Any]]) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def add(function: Callable[[], Any]) -> Callable[[], Any]:
        into[function.__name__] = function
        return function

    return add


def lengths(*counts: int, **more: Any) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=count, ignore_eos=True, **more) for count in counts]


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


def make(**options: Any) -> LLM:
    """The embedded model. Without a GPU by the reference, which compiles nothing."""
    return LLM("tiny", **options if on_gpu else {**options, "backend": "reference"})


def generate(prompts: Any = PROMPTS, params: Any = None, **options: Any) -> list[RequestOutput]:
    return make(**options).generate(prompts, params or lengths(12, 10, 8))


@flow(QUICK)
def managers() -> Any:
    """One run under each manager."""
    options: list[dict[str, Any]] = [{}, {"manager": "standard"}, {"manager": "swapping"}, {"backend": "cuda"}]
    found = [ids(generate(**these)) for these in options]
    assert all(tokens == found[0] for tokens in found)
    return found[0]


@flow(QUICK)
def swap() -> Any:
    """Preemption by swaps, watched by the sanitizer: paged and swapping."""
    params, found = lengths(24, 22, 20), []
    for options in (SWAPS, {"manager": "swapping", "kv_cache_tokens": 64, "sanitize": True}):
        outputs = generate(params=params, **options)
        assert sum(output.num_preemptions for output in outputs) > 0
        found.append(ids(outputs))
    assert found[0] == found[1] == ids(generate(params=params))
    return found[0]


@flow(QUICK)
def fork() -> Any:
    """Samples that share the blocks of their prompt; shared blocks are copied on write, and swapped."""
    params = SamplingParams(max_tokens=24, n=3, temperature=0.9, seed=2, ignore_eos=True)
    outputs = generate(PROMPTS[:2], params, **SWAPS | {"kv_cache_tokens": 100})
    assert sum(output.num_preemptions for output in outputs) > 0
    return ids(outputs)


@flow(QUICK)
def prefix_cache() -> Any:
    llm = make(block_size=4, prefix_cache=True, sanitize=True)
    first, again = (llm.generate([LONG_PROMPT, LONG_PROMPT + PROMPTS[1]], lengths(5, 5)) for _ in range(2))
    assert ids(first) == ids(again)
    return ids(first)


@flow(QUICK)
def beams() -> Any:
    outputs = generate("Once upon a time", SamplingParams(max_tokens=8, beam_width=3), block_size=4, sanitize=True)
    return ids(outputs)


@flow(QUICK)
def sampling() -> Any:
    params = SamplingParams(max_tokens=10, temperature=0.9, top_k=20, top_p=0.9, seed=1)
    hook = SamplingParams(max_tokens=3, logits_hook=lambda tokens, logits: -logits)
    return ids(generate("Once upon a time", params)) + ids(generate("Once", hook))


@flow(QUICK)
def long_contexts() -> Any:
    """Pages stream from the host: all of them, and those that matter."""
    options: dict[str, Any] = {"block_size": 4, "device_blocks": 8, "host_blocks": 80, "max_batch_tokens": 32}
    whole = ids(generate(LONG_PROMPT, lengths(5)))
    assert ids(generate(LONG_PROMPT, lengths(5), **options, sanitize=True)) == whole
    return whole + ids(generate(LONG_PROMPT, lengths(5), **options, attend=4))


@flow(QUICK)
def formats() -> Any:
    """K and V in other number formats, a float16 model, and its swaps."""
    for kv_dtype in ("bfloat16", "int8", "float8"):
        outputs = generate(kv_dtype=kv_dtype, params=lengths(24, 22, 20), **SWAPS)
        assert sum(output.num_preemptions for output in outputs) > 0
    return ids(generate(params=lengths(4, 4, 4), dtype="float16"))


@flow(QUICK)
def sanitizer() -> Any:
    """NaN that attention brings is seen, also where the sampler asks for the largest logit alone."""
    said = []
    for temperature in (0.0, 0.5):
        llm = make(sanitize=True)
        watched: Any = llm.engine.kv
        attend = watched.inner.attend
        watched.inner.attend = lambda *args, attend=attend: attend(*args) * np.float32(np.nan)
        try:
            llm.generate(PROMPTS[1], SamplingParams(max_tokens=3, temperature=temperature, seed=1))
        except SanitizerError as error:
            said.append(str(error))
    assert len(said) == 2
    return said


@flow(QUICK)
def nan_logits() -> Any:
    """Greedy decoding, where the host gets the place of the largest logit alone, and drawing: NaN is an error."""
    said = []
    for temperature in (0.0, 0.5):
        llm = make()
        model: Any = llm.engine.model
        forward = model.forward
        model.forward = lambda *args, forward=forward: forward(*args) * np.float32(np.nan)
        try:
            llm.generate(PROMPTS[1], SamplingParams(max_tokens=3, temperature=temperature, seed=1))
        except ValueError as error:
            said.append(str(error))
    assert len(said) == 2
    return said


@flow(QUICK)
def training() -> Any:
    """The gradient is the same, whatever becomes of the activations."""
    from support import small

    from paged_ref.training.activations import activations_for
    from paged_ref.training.network import loss_and_gradient
    from paged_ref.training.parameters import Parameters

    config = small.config()
    found = []
    for memory, budget in (("keep", None), ("recompute", None), ("swap", 10_000), ("page", 10_000)):
        activations = activations_for(memory, config, 64, budget, page_size=1024)
        gradient = Parameters(config)
        loss = loss_and_gradient(small.weights(config), gradient, small.batch(config), activations)
        found.append((round(float(loss), 4), round(float(gradient.flat @ gradient.flat), 3)))
        assert (activations.counts.moved_in > 0) == (memory in ("swap", "page"))
    assert len(set(found)) == 1
    return found[0]


# --- slow ------------------------------------------------------------------------------------------------------------


@flow(SLOW)
def every_manager() -> Any:
    """All managers and their options: the same tokens, twice from one LLM."""
    prompts, params = [*PROMPTS, LONG_PROMPT], [SamplingParams(max_tokens=n) for n in (20, 16, 12, 9)]
    want = ids(generate(prompts, params))
    options: list[dict[str, Any]] = [
        {"manager": "standard", "reserve": "pow2", "kv_cache_tokens": 512},
        {"manager": "standard", "allocator": "buddy", "kv_cache_tokens": 1024},
        {"manager": "standard", "backend": "cuda"},
        {"manager": "swapping", "kv_cache_tokens": 160},
        {"manager": "swapping", "kv_cache_tokens": 160, "sanitize": True},
        {"block_size": 4, "kv_cache_tokens": 96},
        {"block_size": 4, "kv_cache_tokens": 96, "preemption": "swap", "sanitize": True},
        {"block_size": 4, "prefix_cache": True, "sanitize": True},
        {"block_size": 5, "max_batch_tokens": 7},
        {"block_size": 1},
        {"backend": "cuda"},
        {"backend": "reference"},
    ]
    for these in options:
        llm = make(**these)
        assert ids(llm.generate(prompts, params)) == want, these
        assert ids(llm.generate(prompts, params)) == want, these
    return want


@flow(SLOW)
def every_long_context() -> Any:
    options: dict[str, Any] = {"block_size": 4, "device_blocks": 8, "host_blocks": 80, "max_batch_tokens": 32}
    found = []
    for attend in ("all", 4, 0.5):
        for more in ({"sanitize": True}, {"evict": "sliding"}, {"evict": "relevance"}, {"staging_pages": 3}):
            llm = make(**options, attend=attend, **more)
            found.append(ids(llm.generate([LONG_PROMPT + PROMPTS[0]], lengths(6))))
    whole = ids(generate([LONG_PROMPT + PROMPTS[0]], lengths(6)))
    assert all(tokens == whole for tokens in found[:4])
    return found


@flow(SLOW)
def trainers() -> Any:
    """A run that stopped goes on to the same weights, with every optimizer, by pages."""
    from support import small

    from paged_ref.core.device import to_host
    from paged_ref.training.activations import activations_for
    from paged_ref.training.trainer import Settings, Trainer

    config = small.config()
    stories = [np.random.default_rng(n).integers(1, 23, size=30).tolist() for n in range(20)]
    found = []
    for optimizer in ("adamw", "muon"):
        settings = Settings(3, batch_tokens=120, micro_tokens=60, optimizer=optimizer, warmup=1, dropout=0.1)
        trainer = Trainer(config, settings, stories, activations_for("page", config, 100, 20_000, page_size=1024))
        first, state = trainer.step().loss, trainer.state({})
        second = trainer.step().loss
        weights = to_host(trainer.weights.flat).copy()
        trainer.restore(state)
        assert trainer.step().loss == second
        np.testing.assert_array_equal(to_host(trainer.weights.flat), weights)
        found.append((round(first, 3), round(second, 3)))
    return found


if __name__ == "__main__":
    flows = QUICK | SLOW
    for name in sys.argv[1:] or flows:
        began = time.perf_counter()
        result = flows[name]()
        print(
            json.dumps({"flow": name, "result": result, "seconds": round(time.perf_counter() - began, 1)}), flush=True
        )
