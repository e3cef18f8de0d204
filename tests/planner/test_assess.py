"""The assessment: slots and counts against real managers, times against sums by hand, advice against its rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from paged_ref.core.memory.block_pool import BlockPool, OutOfBlocks
from paged_ref.core.memory.paged import PagedManager
from paged_ref.extras.managers import make_manager
from paged_ref.planner.assess import BEND, WASTE_LIMIT, Assessment, assess
from paged_ref.planner.hardware import GPU, GPUS, several
from paged_ref.planner.metrics import Limits
from paged_ref.planner.model_config import ModelSpec
from paged_ref.planner.models import MODELS
from paged_ref.planner.roofline import Constants, Roofline
from paged_ref.planner.settings import servers
from paged_ref.planner.setup import Setup
from paged_ref.planner.traces import RequestTrace, TraceRequest, generated


def request(prompt: int, output: int) -> TraceRequest:
    return TraceRequest(0.0, prompt, output)


def assessed(gpu: GPU, model: ModelSpec, *requests: TraceRequest, **settings: Any) -> Assessment:
    limits = settings.pop("limits", Limits())
    return assess(Setup("paged", gpu, model, **settings), RequestTrace("t", requests, timed=False), limits)


SHAREGPT = request(161, 338)  # the published means, rounded


@cache
def opt() -> Assessment:
    return assessed(GPUS["A100-40GB"], MODELS["OPT-13B"], SHAREGPT)


@cache
def azure() -> Assessment:
    return assessed(GPUS["A100-80GB"], MODELS["Llama-3-8B"], request(1155, 211))


@pytest.mark.parametrize(("plan", "reserve"), [(0, "max"), (1, "pow2"), (2, "exact")])
def test_as_many_regions_run_as_fit_in_the_standard_manager(plan: int, reserve: Any) -> None:
    manager = make_manager(
        "standard",
        opt().num_tokens,
        max_model_len=opt().max_model_len,
        reserve=reserve,
        allocator="buddy",
    )
    count = 0
    while True:
        try:
            manager.admit(count, [0] * 161, 161 + 338 - 1)
        except OutOfBlocks:
            break
        count += 1
    steady = opt().plans[plan].steady
    assert steady is not None
    assert steady.outcome.running_peak == count


def test_as_many_of_the_longest_fit_in_the_paged_manager() -> None:
    manager = PagedManager(BlockPool(opt().num_tokens // opt().block_size), opt().block_size)
    for seq_id in range(opt().sequences_at_worst):
        manager.admit(seq_id, [0] * opt().longest, opt().longest)
        manager.append([(seq_id, opt().longest)])
    with pytest.raises(OutOfBlocks):
        manager.admit(-1, [0] * opt().longest, opt().longest)


def test_the_paper_s_server_holds_seven_sequences_that_reserve_the_maximum() -> None:
    """Fig. 13: 7.00 batched requests of OPT-13B with Orca (Max). Its pool has 15.7K slots (Table 1)."""
    steady = opt().plans[0].steady
    assert steady is not None
    assert steady.outcome.running_mean == pytest.approx(7.0)
    assert opt().num_tokens == pytest.approx(15_700, rel=0.01)
    assert opt().paged.outcome.shares.occupancy > 0.95  # paged keeps at least 96.3 % of the held slots in tokens there


def test_the_gain_is_that_of_the_sustained_rates() -> None:
    for plan in opt().plans[:-1]:
        assert plan.steady is not None
        assert opt().gain[plan.name] == pytest.approx(opt().paged.sustained_rate / plan.steady.sustained_rate)


@pytest.mark.slow
def test_what_limits_is_where_the_time_goes() -> None:
    assert (opt().paged.admission, opt().paged.step.bound) == ("memory", "bandwidth")
    assert azure().paged.step.bound == "compute"  # prompts five times as long as outputs
    long = assessed(GPUS["A100-80GB"], MODELS["Llama-3-8B"], request(512, 7000))
    assert long.paged.step.bound == "bandwidth"
    assert long.paged.step.kv > long.paged.step.weights


def test_without_a_limit_the_advice_is_where_the_curve_bends() -> None:
    """ShareGPT's lengths, Llama-3-8B with K and V in 8 bits: memory has room for some 1,900 sequences, whose step takes
    0.2 s. `--max-num-seqs 1879` was once the advice."""
    model = replace(MODELS["Llama-3-8B"], kv_bits=8)
    found = assessed(GPUS["A100-80GB"], model, *generated("sharegpt", 200).requests)
    assert found.fit > 1500
    assert found.batches[-1].step_seconds > 0.15
    assert found.advised < 200
    assert found.advised_tpot < 0.04
    rates = [batch.rate for batch in found.batches]
    assert rates == sorted(rates)
    bent = next(batch for batch in found.batches if batch.sequences == found.advised)
    assert bent.rate >= BEND * rates[-1]


@pytest.mark.slow  # commands/test_assess_report.py has a limit with fewer sequences
@pytest.mark.parametrize("tpot", [0.02, 0.05, 0.1])
def test_with_a_limit_the_advice_keeps_it(tpot: float) -> None:
    model = replace(MODELS["Llama-3-8B"], kv_bits=8)
    trace = generated("sharegpt", 200).requests
    found = assessed(GPUS["A100-80GB"], model, *trace, limits=Limits(tpot=tpot), max_batch_seqs=512)
    assert found.advised_tpot <= tpot
    assert 10 < found.advised < found.fit
    for plan in found.plans:
        assert plan.steady is not None
        assert 0 < plan.rate <= plan.steady.sustained_rate


@pytest.mark.slow
def test_a_limit_that_no_number_keeps_is_said() -> None:
    found = assessed(GPUS["A100-40GB"], MODELS["OPT-13B"], SHAREGPT, limits=Limits(tpot=0.001))
    assert (found.advised, found.plans[-1].rate) == (1, 0.0)
    assert found.advised_tpot > 0.001


@pytest.mark.parametrize("found", [opt, azure])
def test_paged_is_never_behind(found: Callable[[], Assessment]) -> None:
    assert all(gain >= 0.99 for gain in found().gain.values())


def test_the_block_size_is_the_largest_within_the_limit() -> None:
    for found in (opt(), azure(), assessed(GPUS["H100-SXM"], MODELS["Llama-3.1-8B"], request(30000, 2000))):
        within = [each.block_size for each in found.block_sizes if each.waste <= WASTE_LIMIT]
        assert found.block_size == (max(within) if within else 16)
    assert (opt().block_size, found.block_size) == (16, 256)


def test_swapping_is_faster_from_the_crossover_on() -> None:
    """Half a link and a fast chip, so that the crossover is not at an end."""
    gpu, model = replace(GPUS["H100-SXM"], link=32e9), MODELS["Llama-3.1-8B"]
    found, roofline = assessed(gpu, model, request(512, 512)), Roofline(gpu, model)
    assert found.swap_from is not None
    assert found.swap_from > found.block_size
    for tokens, faster in ((found.swap_from, True), (found.swap_from - found.block_size, False)):
        assert (roofline.swap_seconds(tokens, found.block_size) < roofline.recompute_seconds(tokens)) == faster
    assert Roofline(replace(gpu, link=1e9), model).swap_from(found.block_size) is None


def test_small_blocks_swap_slowly() -> None:
    """The paper's §7.3: many small copies; computing again does not depend on the block size."""
    roofline = Roofline(opt().gpu, opt().model)
    times = [roofline.swap_seconds(512, size) for size in (1, 4, 16, 64)]
    assert times == sorted(times, reverse=True)
    assert times[0] > 3 * times[2]
    assert times[0] > roofline.recompute_seconds(512)


def test_requests_that_are_too_long_are_cut_or_refused_and_counted() -> None:
    requests = SHAREGPT, request(2000, 49), request(2000, 48), request(2048, 1)
    found = assessed(GPUS["A100-40GB"], MODELS["OPT-13B"], *requests)
    assert (found.paged.num_refused, found.paged.num_cut, found.longest) == (1, 1, 2048)


def test_a_reservation_that_holds_none_is_said() -> None:
    found = assessed(GPUS["RTX-4090"], MODELS["Llama-3.1-8B"], request(1000, 1000), max_model_len=131_072)
    assert (found.plans[0].steady, found.gain["standard max"]) == (None, float("inf"))


@pytest.mark.parametrize(
    ("requests", "max_model_len", "message"),
    [
        ([], None, "no request fits in 2048 tokens; the shortest of 0 has 0"),
        ([request(3000, 1)], None, "no request fits in 2048 tokens; the shortest of 1 has 3001"),
        ([request(0, 5)], None, "a request has 0 prompt and 5 output tokens; both need 1"),
        ([SHAREGPT], 2049, "max_model_len is 2049; 2 to the 2048 of OPT-13B's context"),
        ([SHAREGPT], 1, "max_model_len is 1; 2 to the 2048"),
    ],
)
def test_bad_lengths_are_refused(requests: list[TraceRequest], max_model_len: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assessed(GPUS["A100-40GB"], MODELS["OPT-13B"], *requests, max_model_len=max_model_len)


# --- settings of other servers ------------------------------------------------------------------------------


def test_the_settings_say_what_was_found() -> None:
    vllm, sglang, tensorrt_llm, transformers = servers(opt())
    assert vllm.command == (
        "vllm serve facebook/opt-13b --gpu-memory-utilization 0.9 --block-size 16 --max-model-len 2048 "
        f"--max-num-seqs {opt().advised} --max-num-batched-tokens 2048 --kv-offloading-size 12"
    )
    assert dict(sglang.options)["--mem-fraction-static"] == "0.9"
    # These two count from what the weights leave: 12.06 of 40 - 23.94 GiB.
    assert dict(tensorrt_llm.file_options)["free_gpu_memory_fraction"] == "0.75"
    assert dict(transformers.options)["max_memory_percent"] == "0.75"
    compile(transformers.command, transformers.name, "eval")  # what is to be pasted into Python is Python
    made, line = tensorrt_llm.command.split(" && ")
    assert made.startswith("echo 'kv_cache_config: {free_gpu_memory_fraction: 0.75, tokens_per_block: 16, ")
    assert line.startswith("trtllm-serve facebook/opt-13b --max_batch_size ")
    assert line.endswith(" --config kv_cache_config.yaml")


def test_the_settings_follow_gpus_bits_and_swapping() -> None:
    model = replace(MODELS["Llama-3-70B"], kv_bits=8)
    gpu = several(GPUS["H100-SXM"], 4)
    swapping = assessed(gpu, model, SHAREGPT, constants=Constants(copy_overhead=0))
    words = " ".join(server.command for server in servers(swapping))
    for option in ("--tensor-parallel-size 4", "--tp-size 4", "--kv-cache-dtype fp8", "dtype: fp8", "host_cache_size"):
        assert option in words
    assert "the 8 bits assumed here are not available" in " ".join(servers(swapping)[3].supports)
    slow = assessed(replace(gpu, link=1e8), model, SHAREGPT)
    words = " ".join(server.command for server in servers(slow))
    assert "offload" not in words
    assert "host_cache_size" not in words
    assert "hicache" not in words


def test_the_options_of_transformers_exist_where_it_is_installed() -> None:
    configuration = pytest.importorskip("transformers.generation.configuration_utils")
    if not hasattr(configuration, "ContinuousBatchingConfig"):
        pytest.skip("this transformers has no continuous batching config")
    known = configuration.ContinuousBatchingConfig.__dataclass_fields__
    assert set(dict(servers(opt())[3].options)) <= set(known)
