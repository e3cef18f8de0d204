"""Contexts longer than the device: no token changes in the exact mode, nothing leaks, and the numbers are right.

Everything runs in driving.py's Engine: the sanitizer of pages checks each read, the books balance after each step, and
the events tell the same as the manager.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from support.driving import Engine, Run, furthest
from support.manager_state import pages_of, replay

from paged_ref import SamplingParams
from paged_ref.beyond_device.kv import StreamedKV
from paged_ref.beyond_device.observation import Observation
from paged_ref.core.device import on_gpu
from paged_ref.core.model import loading
from paged_ref.core.model.config import kv_bytes_per_token
from paged_ref.interop.checkpoints import load
from paged_ref.kernels import backends
from paged_ref.timeline.events import Event, PagesAttended, PagesPlaced, from_json, to_json

PROMPTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, "
    "she saw a big dog. The dog was very happy and wanted to play with Lily. They ran and ran",
    "Four score and seven years ago our",
    "The cat",
]
CONFIG = load("tiny").config
PER_BLOCK = CONFIG.num_layers * CONFIG.num_kv_heads  # pages
CONTEXT = CONFIG.max_position_embeddings
GREEDY = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (20, 30, 12)]
BOUND = 1e-4  # of logits up to 20, as in test_equivalence.py


@pytest.fixture(params=["tiny", "stories260k"])
def model(request: pytest.FixtureRequest) -> str:
    return "tiny" if request.param == "tiny" else str(request.getfixturevalue("stories260k"))


@cache
def resident(model: str, max_batch_tokens: int = 512) -> Run:
    return Engine(model, kv_cache_tokens=2048, max_batch_tokens=max_batch_tokens).run(PROMPTS, GREEDY)


def kv_of(engine: Engine) -> StreamedKV:
    kv = engine.llm.engine.kv
    assert isinstance(kv, StreamedKV)
    return kv


def streamed(model: str, **options: Any) -> tuple[Run, Engine, StreamedKV]:
    engine = Engine(model, **options)
    run = engine.run(PROMPTS, GREEDY)
    return run, engine, kv_of(engine)


# --- exact ---------------------------------------------------------------------------------------------

# The smallest device that works is one block: its pages are all of one block of tokens, and the longest sequence has
# 80 tokens. Two pages are the least of all: one to write, one to stage.
DEVICES = [
    {"device_blocks": 1, "block_size": 4},
    {"device_blocks": 1, "block_size": 1, "host_blocks": 140},
    {"device_blocks": 1, "block_size": 16, "evict": "sliding"},
    {"device_blocks": 9, "block_size": 4, "max_batch_tokens": 7},
    {"device_blocks": 20, "block_size": 4, "evict": "relevance"},
    {"device_blocks": 14, "block_size": 16, "host_blocks": 0},  # all of it fits: nothing moves
    {"device_blocks": 1, "block_size": 16, "staging_pages": 1},
    {"device_blocks": 1, "block_size": 8, "staging_pages": PER_BLOCK - 1, "max_batch_tokens": 16},
    {"device_blocks": 5, "block_size": 3, "staging_pages": 8, "backend": "reference"},
    {"device_blocks": 12, "block_size": 8, "backend": "reference"},
]


@pytest.mark.parametrize("options", DEVICES, ids=lambda options: " ".join(map(str, options.values())))
def test_no_token_changes_however_small_the_device(model: str, options: dict[str, Any]) -> None:
    run, engine, kv = streamed(model, **options)
    expected = resident(model, options.get("max_batch_tokens", 512))
    assert run.tokens == expected.tokens
    assert max(furthest(a, b) for a, b in zip(run.logits, expected.logits, strict=True)) < BOUND
    counters = kv.counters
    if options.get("host_blocks") == 0:
        assert counters.bytes_in == counters.bytes_out == 0
        assert counters.hit_rate == 1
    else:
        assert 0 < counters.hit_rate < 1
        assert counters.bytes_in > 0
        assert counters.bytes_out > 0
    per_token = kv_bytes_per_token(engine.llm.config, "float32")
    assert kv.storage.device.nbytes == options["device_blocks"] * options["block_size"] * per_token


@pytest.mark.skipif(on_gpu or "cpu-simd" not in backends(), reason="only the backend cpu-simd has tiles")
def test_tiles_change_no_bit() -> None:
    """One sequence: each step has the same rows, so that no product of the weights is summed in another order."""
    prompt, params = PROMPTS[:1], GREEDY[:1]
    expected = Engine("tiny", kv_cache_tokens=2048, backend="cpu-simd").run(prompt, params)
    run = Engine("tiny", device_blocks=1, block_size=4, backend="cpu-simd").run(prompt, params)
    assert furthest(run.logits[0], expected.logits[0]) == 0


@pytest.fixture(scope="session")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model, each layer of which sees a window of 24 tokens: a Mistral."""
    directory = tmp_path_factory.mktemp("windowed")
    for file in (Path(loading.__file__).parent / "tiny").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mistral", "sliding_window": 24}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(directory)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"device_blocks": 2, "backend": "reference", "staging_pages": 14, "max_batch_tokens": 16},
        {"attend": 2},
    ],
)
def test_sliding_windows(windowed: str, options: dict[str, Any]) -> None:
    max_batch_tokens = options.get("max_batch_tokens", 512)
    expected = Engine(windowed, kv_cache_tokens=2048, max_batch_tokens=max_batch_tokens).run(PROMPTS, GREEDY)
    assert expected.tokens != resident("tiny").tokens
    run, _, _ = streamed(windowed, **{"device_blocks": 1, "block_size": 4, **options})
    assert run.tokens == expected.tokens


def test_a_window_is_all_that_is_read_and_all_the_mass(windowed: str) -> None:
    engine = Engine(windowed, device_blocks=2, block_size=4)
    kv = kv_of(engine)
    seen: list[Observation] = []
    kv.observe = seen.append
    engine.add(PROMPTS[0], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.step()
    length = engine.manager.length(0)
    before = kv.counters.attended
    engine.step()
    assert kv.counters.attended - before == PER_BLOCK * (length // 4 - (length - 24 + 1) // 4 + 1)
    assert len(seen) == 2 * CONFIG.num_layers
    for each in seen:
        np.testing.assert_allclose(each.mass.sum(axis=-1), 1, atol=1e-5)
        assert not each.mass[:, :, : each.chosen[0][0]].any()
    engine.finish()


def test_a_window_that_cannot_be_staged_is_refused_at_once(windowed: str) -> None:
    words = "11 pages for staging; a sliding window of 24 tokens, and steps of up to 16, need 12 at the same time"
    with pytest.raises(ValueError, match=words):
        Engine(windowed, device_blocks=2, block_size=4, staging_pages=11, max_batch_tokens=16)


def test_float16() -> None:
    prompts, params = PROMPTS[1:], GREEDY[1:]
    expected = Engine("tiny", kv_cache_tokens=2048, dtype="float16").run(prompts, params)
    for options in ({}, {"staging_pages": 6}):
        run = Engine("tiny", device_blocks=1, block_size=4, dtype="float16", **options).run(prompts, params)
        assert max(furthest(a, b) for a, b in zip(run.logits, expected.logits, strict=True)) < 0.1


def test_a_prompt_longer_than_the_device_is_computed_in_chunks() -> None:
    """400 tokens on a device of 2 blocks of 16; the bytes are what paper says."""
    ids = [5 + i * 7 % (CONFIG.vocab_size - 5) for i in range(400)]
    params = [SamplingParams(max_tokens=3, ignore_eos=True)]
    expected = Engine("tiny", kv_cache_tokens=512, max_batch_tokens=64).run([ids], params)
    engine = Engine("tiny", device_blocks=2, max_batch_tokens=64)
    run = engine.run([ids], params)
    assert run.tokens == expected.tokens
    assert furthest(run.logits[0], expected.logits[0]) < BOUND


def test_moved_bytes_are_those_on_paper() -> None:
    """Decode at length n with r pages resident: every other page comes in once, each layer, each head."""
    engine = Engine("tiny", device_blocks=8, block_size=16, sanitize=False)
    kv = kv_of(engine)
    engine.add([7] * 320, SamplingParams(max_tokens=9, ignore_eos=True))
    engine.step()
    for _ in range(8):
        before = replace(kv.counters)
        resident_pages = sum(b >= 0 for b in kv.manager.residency.device_of)
        assert resident_pages == 8 * PER_BLOCK
        engine.step()
        after = kv.counters
        num_pages = 21 * PER_BLOCK  # 21 blocks hold 321 to 336 tokens
        assert after.attended - before.attended == num_pages
        missing = num_pages - (after.resident - before.resident)
        moved = after.bytes_in - before.bytes_in
        assert moved >= missing * kv.page_bytes
        assert moved <= (missing + PER_BLOCK) * kv.page_bytes  # and the last pages, where they had left
        assert after.bytes_out - before.bytes_out <= PER_BLOCK * kv.page_bytes
    engine.finish()


@pytest.mark.parametrize("batch", [1, 5])
def test_the_device_stays_as_it_is_while_the_context_grows(batch: int) -> None:
    sizes = set()
    for tokens in (20, 60, 150):
        engine = Engine("tiny", device_blocks=3, max_batch_tokens=batch, sanitize=False)
        engine.add([9] * tokens, SamplingParams(max_tokens=2))
        engine.finish()
        sizes.add(kv_of(engine).device_bytes)
    assert len(sizes) == 1


def test_sequences_that_do_not_fit_together_take_turns() -> None:
    """A host for 25 blocks of 4: two of the three must wait or begin anew, and no token changes."""
    run, engine, _ = streamed("tiny", device_blocks=2, block_size=4, host_blocks=25)
    assert run.tokens == resident("tiny").tokens
    assert engine.manager.num_slots < sum(len(p.prompt_token_ids) + 19 for p in run.outputs)


def test_sampling_and_aborting_leave_nothing_behind() -> None:
    engine = Engine("tiny", device_blocks=2, block_size=4, host_blocks=60)
    params = SamplingParams(max_tokens=12, temperature=0.9, seed=3, n=3, ignore_eos=True)
    twin = Engine("tiny", kv_cache_tokens=2048).run(PROMPTS[1:2], [params])
    keep = engine.add(PROMPTS[1], params)
    gone = engine.add(PROMPTS[0], GREEDY[0])
    for _ in range(3):
        engine.step()
    engine.llm.abort(gone.request_id)
    engine.check()
    engine.finish()
    assert [sample.token_ids for sample in keep.outputs] == twin.tokens[0]


# --- what does not go ----------------------------------------------------------------------------------


def test_a_host_too_small_refuses_the_request_and_leaves_others_alone() -> None:
    engine = Engine("tiny", device_blocks=2, host_blocks=6, block_size=4, max_model_len=120)
    small = engine.add(PROMPTS[2], GREEDY[2])
    engine.step()
    with pytest.raises(ValueError, match="can need 100 slots of KV cache; the cache has 28"):
        engine.add([7] * 80, SamplingParams(max_tokens=20))
    engine.finish()
    assert small.outputs[0].token_ids == resident("tiny").tokens[2][0]


def test_beam_search_and_swapping_are_refused() -> None:
    engine = Engine("tiny", device_blocks=2)
    with pytest.raises(ValueError, match="only the paged manager can share"):
        engine.add("Once", SamplingParams(beam_width=2))
    with pytest.raises(ValueError, match="preemption is 'swap', and device_blocks is 2"):
        Engine("tiny", device_blocks=2, preemption="swap")


# --- with a budget -------------------------------------------------------------------------------------


def test_a_budget_bounds_what_is_read_and_moved() -> None:
    engine = Engine("tiny", device_blocks=12, block_size=16, attend=4, full_layers=1)
    kv = kv_of(engine)
    assert kv.manager.evict == "relevance"
    engine.add(
        [5 + i * 11 % (CONFIG.vocab_size - 5) for i in range(330)], SamplingParams(max_tokens=20, ignore_eos=True)
    )
    engine.step()
    for _ in range(10):
        before = replace(kv.counters)
        engine.step()
        num_blocks = -(-engine.manager.length(0) // 16)
        per_head = num_blocks + (CONFIG.num_layers - 1) * 4
        assert kv.counters.attended - before.attended == CONFIG.num_kv_heads * per_head
    engine.finish()


@pytest.mark.parametrize("evict", ["lru", "sliding", "relevance"])
def test_a_budget_of_all_blocks_changes_no_token(evict: str) -> None:
    for attend in (1.0, 1000):
        run, _, _ = streamed("tiny", device_blocks=3, block_size=4, attend=attend, evict=evict, full_layers=0)
        assert run.tokens == resident("tiny").tokens


def test_what_was_chosen_stays_so_that_less_moves() -> None:
    """The same budget, the same device: the policy that keeps what mattered moves least."""
    moved = {}
    for evict in ("relevance", "sliding"):
        engine = Engine("tiny", device_blocks=20, block_size=4, attend=0.2, evict=evict, sanitize=False, full_layers=0)
        engine.add(PROMPTS[0] * 4, SamplingParams(max_tokens=40, ignore_eos=True))
        engine.step()
        kv_of(engine).counters.bytes_in = 0
        engine.finish()
        moved[evict] = kv_of(engine).counters.bytes_in
    assert moved["relevance"] < moved["sliding"]


def test_what_is_observed_adds_up(model: str) -> None:
    """The shares of all blocks are one; what the exact mode reads is all of it, and a budget reads the mass it says."""
    for attend, least, most in (("all", 1.0, 1.0), (0.25, 0.1, 0.999)):
        engine = Engine(model, device_blocks=4, block_size=4, attend=attend, full_layers=0)
        seen: list[Observation] = []
        kv_of(engine).observe = seen.append
        engine.add(PROMPTS[0], SamplingParams(max_tokens=8, ignore_eos=True))
        engine.step()
        seen.clear()  # the prompt attends to all
        engine.finish()
        assert len(seen) == 7 * engine.llm.config.num_layers
        for each in seen:
            np.testing.assert_allclose(each.mass.sum(axis=-1), 1, atol=1e-5)
        read = [o.mass[head][:, chosen].sum(axis=-1) for o in seen for head, chosen in enumerate(o.chosen)]
        assert least - 1e-5 <= float(np.mean(read)) <= most + 1e-5


# --- events --------------------------------------------------------------------------------------------


def test_a_log_tells_where_every_page_was_and_survives_json() -> None:
    engine = Engine("tiny", device_blocks=2, block_size=4, attend=0.5)
    watch = kv_of(engine).watch = (CONFIG.num_layers - 1, CONFIG.num_heads - 1)
    run = engine.run(PROMPTS[:2], GREEDY[:2])
    events = [from_json(to_json(event)) for event in engine.events]
    assert events == engine.events
    assert replay(events).pages == pages_of(kv_of(engine).manager)
    attended = [event for event in events if isinstance(event, PagesAttended)]
    assert {(event.layer, event.head) for event in attended} == {watch}
    assert len(attended) == sum(len(output.outputs[0].token_ids) for output in run.outputs)
    for event in attended:
        assert abs(sum(event.mass) - 10**6) <= len(event.mass)
        assert set(event.chosen) <= set(range(len(event.mass)))
    without = Engine("tiny", device_blocks=2, block_size=4, attend=0.5, log=None).run(PROMPTS[:2], GREEDY[:2])
    assert without.tokens == run.tokens


def test_a_log_that_puts_two_pages_in_one_block_is_refused() -> None:
    engine = Engine("tiny", device_blocks=2, block_size=4)
    engine.run(PROMPTS[1:2], GREEDY[1:2])
    events: list[Event] = list(engine.events)
    i, placed = next((i, e) for i, e in enumerate(events) if isinstance(e, PagesPlaced) and len(e.pages) > 1)
    events[i] = structs.replace(placed, device_blocks=(placed.device_blocks[0],) * len(placed.pages))
    with pytest.raises(ValueError, match=f"event {i + 1}, PagesPlaced, .*device block .* has two pages"):
        replay(events)
