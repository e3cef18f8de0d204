"""The clock: against sums by hand, the paper's Table 1, and what must hold for any model on any GPU."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_ref.core.memory.manager import Transfer
from paged_ref.planner.hardware import GPU, GPUS, gpu_named, several
from paged_ref.planner.models import MODELS, model_named
from paged_ref.planner.roofline import CONSTANTS, Constants, Roofline, chunk_pairs, explain

IDEAL = Constants(1, 1, 1, 0, 0, 1, 1, 0)
A100, LLAMA = GPUS["A100-80GB"], MODELS["Llama-3-8B"]


def test_a_decode_step_by_hand() -> None:
    """One sequence of 1000 tokens: all weights but the embedding once, 1000 K and V, two operations a weight."""
    time = Roofline(A100, LLAMA, IDEAL).step(1, 1000)
    multiplied = 8_030_261_248 - 128256 * 4096
    assert time.weights == pytest.approx(multiplied * 2 / 2039e9)
    assert time.kv == pytest.approx(1000 * 131072 / 2039e9)
    assert time.compute == pytest.approx((2 * multiplied + 4 * 32 * 4096 * 1000) / 312e12)
    assert time.bound == "bandwidth"
    assert time.seconds == time.weights + time.kv


def test_a_prefill_is_bound_by_arithmetic() -> None:
    pairs = chunk_pairs(2048, 2048)
    assert pairs == sum(range(1, 2049))
    assert chunk_pairs(100, 3) == 98 + 99 + 100
    time = Roofline(A100, LLAMA, IDEAL).step(2048, 2048, pairs, num_logits=1)
    assert time.bound == "compute"
    assert time.seconds == pytest.approx(
        (2 * (8_030_261_248 - 2 * 128256 * 4096) * 2048 + 2 * 128256 * 4096 + 4 * 32 * 4096 * pairs) / 312e12
    )


@pytest.mark.parametrize(
    ("model", "gpu", "count", "slots"), [("OPT-13B", "A100-40GB", 1, 15_700), ("OPT-66B", "A100-40GB", 4, 9_700),
                                         ("OPT-175B", "A100-80GB", 8, 60_100)],
)  # fmt: skip
def test_the_slots_of_the_paper(model: str, gpu: str, count: int, slots: int) -> None:
    """Table 1 of the paper: the most K and V slots of each of its servers."""
    assert Roofline(several(GPUS[gpu], count), MODELS[model]).num_kv_tokens() == pytest.approx(slots, rel=0.06)


def test_a_model_too_large_names_what_would_hold_it() -> None:
    with pytest.raises(ValueError, match=r"131\.4 GiB of weights; A100-80GB has 72\.0 GiB.* 2 such GPUs hold it, or"):
        Roofline(A100, MODELS["Llama-3-70B"]).kv_cache_bytes()
    assert Roofline(several(A100, 2), MODELS["Llama-3-70B"]).kv_cache_bytes() > 0
    assert Roofline(A100, replace(MODELS["Llama-3-70B"], weight_bits=8)).kv_cache_bytes() > 0
    just_too_small = replace(A100, memory_bytes=int(LLAMA.weight_bytes / 0.9) + 1000)
    with pytest.raises(ValueError, match="no room for the K and V of one token"):
        Roofline(just_too_small, LLAMA).num_kv_tokens()


def test_more_gpus_than_kv_heads_keep_k_and_v_twice() -> None:
    assert Roofline(several(A100, 8), LLAMA).kv_copies == 1
    assert Roofline(several(A100, 16), LLAMA).kv_copies == 2


def test_small_copies_cost_more_than_their_bytes() -> None:
    assert Roofline(A100, LLAMA, IDEAL).link_seconds(32e9, 1) == 1.0
    constants = Constants(link_share=0.5, copy_overhead=1e-5)
    assert Roofline(A100, LLAMA, constants).link_seconds(16e6, 100) == pytest.approx(16e6 / 16e9 + 1e-3)


@given(st.sampled_from(list(GPUS)), st.sampled_from(list(MODELS)), st.integers(1, 4096), st.integers(0, 10**6))
def test_more_work_is_never_faster(gpu: str, model: str, tokens: int, kv: int) -> None:
    def step_seconds(gpu: GPU, tokens: int, kv: int, constants: Constants = CONSTANTS) -> float:
        return Roofline(gpu, MODELS[model], constants).step(tokens, kv).seconds

    less = step_seconds(GPUS[gpu], tokens, kv)
    assert less <= step_seconds(GPUS[gpu], tokens + 1, kv)
    assert less <= step_seconds(GPUS[gpu], tokens, kv + 1)
    together = replace(several(GPUS[gpu], 2), peer=1e30)  # without traffic
    assert less >= step_seconds(together, tokens, kv, Constants(reduce_overhead=0)) * (1 - 1e-12)
    assert less >= step_seconds(GPUS[gpu], tokens, kv, IDEAL)


def test_every_constant_is_explained_and_bounded() -> None:
    names = [name for name, _, why in explain() if why]
    assert names == ["bandwidth_share", "compute_share", "link_share", "step_overhead", "copy_overhead", "memory_share",
                     "peer_share", "reduce_overhead"]  # fmt: skip
    assert model_named("tiny").weight_bits == 32
    with pytest.raises(ValueError, match="compute_share is 0; above 0 to 1 is needed"):
        Constants(compute_share=0)
    with pytest.raises(ValueError, match="step_overhead is -1; 0 or more"):
        Constants(step_overhead=-1)


# --- what a simulation asks for ---------------------------------------------------------------------------


@pytest.mark.parametrize("constants", [CONSTANTS, Constants(bandwidth_share=0.5, compute_share=0.3, step_overhead=0.0)])
@pytest.mark.parametrize("name", ["OPT-13B", "Llama-3-8B", "tiny"])
def test_the_seconds_of_a_step_are_those_of_its_slower_side(name: str, constants: Constants) -> None:
    rng = random.Random(0)
    model = model_named(name)
    for gpu in (gpu_named("A100-40GB"), several(gpu_named("T4"), 16)):
        roofline = Roofline(gpu, model, constants)
        bandwidth, flops = gpu.bandwidth * constants.bandwidth_share, gpu.flops * constants.compute_share
        multiplied, head = model.num_parameters - model.num_looked_up, model.vocab_size * model.hidden_size
        bounds = set()
        for _ in range(200):
            tokens, logits = rng.randint(1, 4096), rng.randint(0, 256)
            kv, pairs = rng.randint(1, 10**6), rng.randint(1, 10**7)
            kept = kv * max(1, gpu.count / model.num_kv_heads) * model.kv_bytes_per_token
            reading = (multiplied * model.weight_bits / 8 + kept) / bandwidth
            products = 2 * ((multiplied - head) * tokens + head * logits)
            products += 4 * model.num_layers * model.num_heads * model.head_size * pairs
            traffic = 0.0
            if gpu.count > 1:  # 16-bit hidden states, two sums in a layer
                sent = 2 * (gpu.count - 1) / gpu.count * 2 * model.hidden_size * tokens
                one = sent / (gpu.peer * constants.peer_share) + constants.reduce_overhead
                traffic = 2 * model.num_layers * one
            expected = max(reading, products / flops) + traffic + constants.step_overhead
            assert roofline.seconds(tokens, kv, pairs, logits) == pytest.approx(expected, rel=1e-9)
            assert roofline.seconds(tokens, kv, pairs, logits) == roofline.step(tokens, kv, pairs, logits).seconds
            bounds.add(reading > products / flops)
        assert bounds == {True, False}  # both sides of the roof were met
        assert roofline.step(7, 500) == roofline.step(7, 500, 500, 7)


def test_transfers_are_copies_in_each_array() -> None:
    gpu, model = gpu_named("A100-40GB"), model_named("OPT-13B")
    roofline = Roofline(gpu, model)
    row = 16 * model.kv_bytes_per_token
    seconds, moved, swapped = roofline.transfers([Transfer("swap_out", 0, 1), Transfer("swap_in", 0, 1, 3)], 16)
    assert (moved, swapped) == (0, 4 * row)
    expected = roofline.link_seconds(row, 80) + roofline.link_seconds(3 * row, 80)  # K and V of 40 layers
    assert seconds == pytest.approx(expected)
    seconds, moved, swapped = roofline.transfers([Transfer("move", 0, 5, 10)], 1)
    assert (moved, swapped) == (10 * model.kv_bytes_per_token, 0)
    assert seconds == pytest.approx(2 * moved / (gpu.bandwidth * CONSTANTS.bandwidth_share))  # read and written
    assert roofline.transfers([], 16) == (0.0, 0, 0)


# --- experts, latents, several GPUs ----------------------------------------------------------------------


def test_a_step_reads_the_experts_that_its_tokens_use() -> None:
    """Mixtral-8x7B: 32 layers x 8 experts x 3 x 4096 x 14336 weights, of which a token uses a quarter."""
    model = MODELS["Mixtral-8x7B"]
    experts = 32 * 8 * 3 * 4096 * 14336
    rest = 46_702_792_704 - experts - 32000 * 4096  # the embedding is looked up
    roofline = Roofline(A100, model, IDEAL)
    assert roofline.step(1, 100).weights == pytest.approx(2 * (rest + experts / 4) / 2039e9)
    assert roofline.step(2, 100).weights == pytest.approx(2 * (rest + experts * (1 - 0.75**2)) / 2039e9)
    assert roofline.step(500, 100).weights == pytest.approx(2 * (rest + experts) / 2039e9)
    multiplied = rest + experts / 4
    assert roofline.step(1, 0).compute == pytest.approx(2 * multiplied / 312e12)
    assert roofline.seconds(2, 100, 100, 2) == roofline.step(2, 100).seconds


def test_the_latent_of_mla_is_on_each_gpu() -> None:
    """DeepSeek-V3: 61 layers x (512 + 64) x 2 bytes = 70,272 bytes on each of 8 GPUs."""
    gpu = several(GPUS["H200"], 8)
    roofline = Roofline(gpu, MODELS["DeepSeek-V3"], IDEAL)
    assert roofline.step(1, 1000).kv == pytest.approx(8 * 1000 * 70_272 / (8 * 4.8e12))
    assert roofline.num_kv_tokens() == (8 * 141 * 2**30 - 671_026_419_200) // (8 * 70_272)


def test_all_reduces_by_hand() -> None:
    """Llama-3.1-70B on 4 H100: 160 sums of 8192 x 2 bytes a token; each GPU sends 2 x 3/4 of it at 450 GB/s."""
    gpu = several(GPUS["H100-SXM"], 4)
    roofline = Roofline(gpu, MODELS["Llama-3.1-70B"], Constants(peer_share=1, reduce_overhead=1e-5))
    step = roofline.step(100, 5000)
    assert step.link == pytest.approx(160 * (1e-5 + 1.5 * 100 * 8192 * 2 / 450e9))
    assert step.seconds == pytest.approx(max(step.weights + step.kv, step.compute) + step.link + 0.002)
    assert Roofline(GPUS["H100-SXM"], LLAMA).step(100, 5000).link == 0
    slow = several(GPUS["RTX-4090"], 8)  # no NVLink: the traffic of a prefill is what a step waits for
    assert Roofline(slow, LLAMA).step(2048, 2048, chunk_pairs(2048, 2048), 1).bound == "link"
