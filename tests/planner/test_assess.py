"""The assessment: slots and counts against real managers, times against sums by hand, advice against its rule."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_ref.core.memory.block_pool import BlockPool, OutOfBlocks
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.standard import StandardManager
from paged_ref.planner.assess import WASTE_LIMIT, _held_in_blocks, assess, predict
from paged_ref.planner.comparison import setups
from paged_ref.planner.hardware import GPUS, several
from paged_ref.planner.models import MODELS
from paged_ref.planner.roofline import Constants, Roofline
from paged_ref.planner.settings import servers
from paged_ref.planner.setup import Setup
from paged_ref.planner.traces import RequestTrace, TraceRequest, generated


def request(prompt: int, output: int) -> TraceRequest:
    return TraceRequest(0.0, prompt, output)


SHAREGPT = [request(161, 338)]  # the published means, rounded
OPT = assess(GPUS["A100-40GB"], MODELS["OPT-13B"], SHAREGPT)
AZURE = assess(GPUS["A100-80GB"], MODELS["Llama-3-8B"], [request(1155, 211)])


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 4, 16, 32]))
def test_slots_in_blocks_are_those_that_the_manager_holds(prompt: int, output: int, block_size: int) -> None:
    manager = PagedManager(BlockPool(200), block_size)
    manager.admit(0, [0] * prompt, prompt + output)
    manager.append([(0, prompt)])
    held = 0
    for _ in range(output):  # each output token's step has a slot for it
        manager.append([(0, 1)])
        held += manager.pool.num_blocks - manager.pool.num_free
    expected = block_size * held / output
    assert _held_in_blocks([request(prompt, output)], block_size) == pytest.approx(expected)


@pytest.mark.parametrize(("plan", "reserve"), [(0, "max"), (1, "pow2"), (2, "exact")])
def test_as_many_regions_fit_in_the_standard_manager(plan: int, reserve: str) -> None:
    manager = StandardManager(OPT.num_tokens, OPT.max_model_len, reserve)  # type: ignore[arg-type]
    count = 0
    while True:
        try:
            manager.admit(count, [0] * 161, 161 + 338)
        except OutOfBlocks:
            break
        count += 1
    assert count == OPT.plans[plan].sequences


def test_as_many_of_the_longest_fit_in_the_paged_manager() -> None:
    manager = PagedManager(BlockPool(OPT.num_tokens // OPT.block_size), OPT.block_size)
    for seq_id in range(OPT.sequences_at_worst):
        manager.admit(seq_id, [0] * OPT.longest, OPT.longest)
        manager.append([(seq_id, OPT.longest)])
    with pytest.raises(OutOfBlocks):
        manager.admit(-1, [0] * OPT.longest, OPT.longest)


def test_the_paper_s_server_holds_seven_sequences_that_reserve_the_maximum() -> None:
    """Fig. 13: 7.00 batched requests of OPT-13B with Orca (Max). Its pool has 15.7K slots (Table 1)."""
    assert OPT.plans[0].sequences == 7
    assert OPT.num_tokens == pytest.approx(15_700, rel=0.01)
    assert OPT.paged.used > 0.95  # paged keeps at least 96.3 % of the held slots in tokens there


def test_requests_per_second_by_hand() -> None:
    """In each step every sequence decodes, and for each that ends, one in 338, a prompt of 161 is computed."""
    plan = OPT.paged
    begin = plan.sequences / 338
    length = 161 + 339 / 2
    step = Roofline(OPT.gpu, OPT.model).step(
        round(plan.sequences + begin * 161),
        round(plan.sequences * length + begin * 161),
        round(plan.sequences * length + begin * 161 * 162 / 2),
        int(plan.sequences),
    )
    assert plan.step == step
    assert plan.requests_per_second == pytest.approx(begin / step.seconds)
    assert plan.tokens_per_second == pytest.approx(338 * plan.requests_per_second)
    assert OPT.gain["standard max"] == pytest.approx(plan.requests_per_second / OPT.plans[0].requests_per_second)


class Estimate(NamedTuple):
    """The steady state, worked out apart from the planner: no whole sequences, and half a block is empty."""

    slots: float  # that a running sequence takes from the pool, on average over time
    sequences: float
    rate: float  # requests per second
    bound: str


def estimate(setup: Setup, trace: RequestTrace) -> Estimate:
    """A sequence runs for as many steps as it has output tokens, so an average over time weighs by these."""
    each = [(r.prompt_len, min(r.output_len, setup.longest - r.prompt_len)) for r in trace.requests]
    prompts, outputs = sum(prompt for prompt, _ in each), sum(output for _, output in each)
    tokens = sum(output * (prompt + output / 2) for prompt, output in each) / outputs  # held, half way through
    if setup.manager == "standard":  # the whole region, all the time
        manager = setup.make_manager()
        slots = sum(output * manager.max_slots_needed(prompt, prompt + output - 1) for prompt, output in each) / outputs
    else:  # half of the last block, or of the last 16 slots of a region, is empty
        slots = tokens + (setup.block_size if setup.manager == "paged" else 16) / 2
    running = max(1.0, min(setup.max_batch_seqs, setup.num_slots / slots))
    if setup.manager == "standard" and setup.reserve == "max":
        running = float(int(running))
    # In each step every sequence gets a token, and as many prompts are computed as outputs end.
    prompt_tokens = running * prompts / outputs
    pairs = running * (tokens + sum(prompt * prompt / 2 for prompt, _ in each) / outputs)
    step = Roofline(setup.gpu, setup.model, setup.constants).step(
        round(running + prompt_tokens), round(running * tokens + prompt_tokens), round(pairs), round(running)
    )
    return Estimate(slots, running, running / (outputs / len(each)) / step.seconds, step.bound)


@pytest.mark.parametrize("name", ["OPT-13B", "Llama-3-8B"])
def test_an_estimate_made_apart_agrees(name: str) -> None:
    gpu = GPUS["A100-40GB"]
    trace = generated("alpaca", 300)
    found = assess(gpu, MODELS[name], trace.requests)
    for plan in found.plans:
        manager, _, kind = plan.name.partition(" ")
        setup = Setup("", gpu, MODELS[name], max_batch_seqs=10**6)
        if manager == "standard":
            setup = replace(setup, manager="standard", reserve=kind)  # type: ignore[arg-type]
        expected = estimate(setup, trace)
        assert plan.slots == pytest.approx(expected.slots, rel=0.02)
        assert plan.requests_per_second == pytest.approx(expected.rate, rel=0.05)


@pytest.mark.parametrize("trace", [generated("sharegpt", 300), generated("alpaca", 300)], ids=lambda trace: trace.name)
def test_the_prediction_of_compare_agrees_with_the_estimate(trace: RequestTrace) -> None:
    base = Setup("paged", GPUS["A100-40GB"], MODELS["OPT-13B"])
    for setup in setups(base, [8, 16]):  # half a block is a rough estimate where a block holds a whole request
        predicted, expected = predict(setup, trace), estimate(setup, trace)
        assert predicted.slots == pytest.approx(expected.slots, rel=0.02)
        assert predicted.sequences == pytest.approx(expected.sequences, rel=0.02)
        assert predicted.requests_per_second == pytest.approx(expected.rate, rel=0.02)
        assert predicted.step.bound == expected.bound


def test_the_bottleneck_is_where_the_time_goes() -> None:
    assert OPT.bottleneck == "capacity"  # few large K and V: the weights are read for few sequences
    assert AZURE.bottleneck == "compute"  # prompts five times as long as outputs
    long = assess(GPUS["A100-80GB"], MODELS["Llama-3-8B"], [request(512, 7000)])
    assert long.bottleneck == "bandwidth"


@pytest.mark.parametrize("found", [OPT, AZURE], ids=["OPT", "AZURE"])
def test_paged_is_never_behind(found: object) -> None:
    assert all(gain >= 1 for gain in found.gain.values())  # type: ignore[attr-defined]


def test_the_block_size_is_the_largest_within_the_limit() -> None:
    for found in (OPT, AZURE, assess(GPUS["H100-SXM"], MODELS["Llama-3.1-8B"], [request(30000, 2000)])):
        within = [each.block_size for each in found.block_sizes if each.waste <= WASTE_LIMIT]
        assert found.block_size == (max(within) if within else 16)
    assert (OPT.block_size, found.block_size) == (16, 256)


def test_swapping_is_faster_from_the_crossover_on() -> None:
    """Half a link and a fast chip, so that the crossover is not at an end."""
    gpu, model = replace(GPUS["H100-SXM"], link=32e9), MODELS["Llama-3.1-8B"]
    found, roofline = assess(gpu, model, [request(512, 512)]), Roofline(gpu, model)
    assert found.swap_from is not None
    assert found.swap_from > found.block_size
    for tokens, faster in ((found.swap_from, True), (found.swap_from - found.block_size, False)):
        assert (roofline.swap_seconds(tokens, found.block_size) < roofline.recompute_seconds(tokens)) == faster
    never = assess(replace(gpu, link=1e9), model, [request(512, 512)])
    assert never.swap_from is None


def test_small_blocks_swap_slowly() -> None:
    """The paper's §7.3: many small copies; computing again does not depend on the block size."""
    roofline = Roofline(OPT.gpu, OPT.model)
    times = [roofline.swap_seconds(512, size) for size in (1, 4, 16, 64)]
    assert times == sorted(times, reverse=True)
    assert times[0] > 3 * times[2]
    assert times[0] > roofline.recompute_seconds(512)


def test_requests_that_are_too_long_are_counted() -> None:
    found = assess(GPUS["A100-40GB"], MODELS["OPT-13B"], [*SHAREGPT, request(2000, 49), request(2000, 48)])
    assert (found.num_refused, found.longest) == (1, 2048)


def test_a_reservation_that_holds_none_is_said() -> None:
    found = assess(GPUS["RTX-4090"], MODELS["Llama-3.1-8B"], [request(1000, 1000)])
    assert (found.plans[0].sequences, found.gain["standard max"]) == (0, float("inf"))


@pytest.mark.parametrize(
    ("requests", "max_model_len", "message"),
    [
        ([], None, "no request fits in 2048 tokens; the shortest of 0 has 0"),
        ([request(3000, 1)], None, "no request fits in 2048 tokens; the shortest of 1 has 3001"),
        ([request(0, 5)], None, "a request has 0 prompt and 5 output tokens; both need 1"),
        (SHAREGPT, 2049, "max_model_len is 2049; 2 to the 2048 of OPT-13B's context"),
        (SHAREGPT, 1, "max_model_len is 1; 2 to the 2048"),
    ],
)
def test_bad_lengths_are_refused(requests: list[TraceRequest], max_model_len: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assess(GPUS["A100-40GB"], MODELS["OPT-13B"], requests, max_model_len=max_model_len)


# --- settings of other servers ------------------------------------------------------------------------------


def test_the_settings_say_what_was_found() -> None:
    vllm, sglang, tensorrt_llm, transformers = servers(OPT)
    assert vllm.command == (
        "vllm serve OPT-13B --gpu-memory-utilization 0.9 --block-size 16 --max-model-len 2048 "
        f"--max-num-seqs {OPT.paged.sequences} --kv-offloading-size 12"
    )
    assert dict(sglang.options)["--mem-fraction-static"] == "0.9"
    # These two count from what the weights leave: 12.06 of 40 - 23.94 GiB.
    assert dict(tensorrt_llm.options)["free_gpu_memory_fraction"] == "0.75"
    assert dict(transformers.options)["max_memory_percent"] == "0.75"
    for server in (tensorrt_llm, transformers):
        compile(server.command, server.name, "eval")  # what is to be pasted into Python is Python


def test_the_settings_follow_gpus_bits_and_swapping() -> None:
    model = replace(MODELS["Llama-3-70B"], kv_bits=8)
    gpu = several(GPUS["H100-SXM"], 4)
    swapping = assess(gpu, model, SHAREGPT, constants=Constants(copy_overhead=0))
    words = " ".join(server.command for server in servers(swapping))
    for option in ("--tensor-parallel-size 4", "--tp-size 4", "--kv-cache-dtype fp8", "dtype='fp8'", "host_cache_size"):
        assert option in words
    assert "the 8 bits assumed here are not available" in " ".join(servers(swapping)[3].supports)
    slow = assess(replace(gpu, link=1e8), model, SHAREGPT)
    words = " ".join(server.command for server in servers(slow))
    assert "offload" not in words
    assert "host_cache_size" not in words
    assert "hicache" not in words


def test_the_options_of_transformers_exist_where_it_is_installed() -> None:
    configuration = pytest.importorskip("transformers.generation.configuration_utils")
    if not hasattr(configuration, "ContinuousBatchingConfig"):
        pytest.skip("this transformers has no continuous batching config")
    known = configuration.ContinuousBatchingConfig.__dataclass_fields__
    assert set(dict(servers(OPT)[3].options)) <= set(known)
