"""The paper's figures: counts and shares land in their bands, and the bands are no wider than what is not known."""

from __future__ import annotations

import random

import pytest

from paged_ref.extras.sampling_params import SamplingParams
from paged_ref.llm import LLM
from paged_ref.planner import paper, sharing
from paged_ref.planner.engine_run import token_ids
from paged_ref.planner.findings import Figure, Finding, RunCache
from paged_ref.planner.paper import COUNT, ORCA, PAGED, POINTS
from paged_ref.planner.sharing import Saving, beams_saving, samples_saving
from paged_ref.planner.simulate import Simulation
from paged_ref.planner.traces import MEANS, RequestTrace, TraceRequest, at_rate, clipped, generated
from paged_ref.planner.workers import Workers


@pytest.fixture(scope="module")
def cache() -> RunCache:
    return RunCache(Workers(1))


def outside(figure: Figure) -> list[str]:
    return [finding.what for finding in figure.findings if finding.met is False]


def test_shares_and_counts_of_memory_land_in_their_bands(cache: RunCache) -> None:
    shares, counts = paper.figure_2(cache), paper.figure_13(cache)
    assert outside(shares) == []
    # Memory is full here, and was not at the paper's rate; and steps on a datasheet's clock are short.
    assert outside(counts) == ["alpaca, paged", "alpaca at 30 per second, paged"]
    assert len(shares.findings) == 13
    assert len(counts.findings) == 9


def test_the_rates_are_the_papers_multiples(cache: RunCache) -> None:
    rates = paper.figure_12(cache)
    judged = {finding.what: finding.met for finding in rates.findings if finding.met is not None}
    assert list(judged) == [
        "sharegpt: against Orca exact", "sharegpt: against Orca max",
        "alpaca: against Orca exact", "alpaca: against Orca max",
    ]  # fmt: skip
    assert all(judged.values())


def gamma(variation: float, count: int, seed: int) -> RequestTrace:
    """ShareGPT's means in another shape."""
    rng = random.Random(seed)

    def length(mean: float) -> int:
        return max(1, round(rng.gammavariate(variation**-2, mean * variation**2)))

    prompts, outputs = MEANS["sharegpt"]
    each = tuple(TraceRequest(0.0, length(prompts), length(outputs)) for _ in range(count))
    return clipped(RequestTrace("gamma", each, timed=False), 2048)


def test_the_bands_are_no_wider_than_other_shapes_of_the_lengths_move_the_figures() -> None:
    furthest_share = furthest_count = 0.0
    for setup in (ORCA["max"], ORCA["pow2"], ORCA["exact"], PAGED):
        runs = [
            Simulation(setup, at_rate(trace, float("inf"))).run()
            for trace in (generated("sharegpt", 500), gamma(0.7, 500, 0), gamma(1.4, 500, 0))
        ]
        for part in ("tokens", "reserved", "internal", "external"):
            ours, *others = (100 * getattr(run.shares, part) for run in runs)
            furthest_share = max(furthest_share, *(abs(other - ours) for other in others))
        ours, *others = (run.running_short for run in runs)
        furthest_count = max(furthest_count, *(abs(other / ours - 1) for other in others))
    assert POINTS <= furthest_share <= POINTS + 3
    assert 0.8 * COUNT <= furthest_count <= 1.5 * COUNT


def test_what_two_figures_need_is_run_once() -> None:
    ended: list[int] = []
    runs = RunCache(Workers(1), on_run=lambda: ended.append(1))
    assert runs.all(pow, [(2, 1), (2, 2), (2, 1)]) == [2, 4, 2]
    assert runs.all(pow, [(2, 2), (2, 3)]) == [4, 8]
    assert len(ended) == 3


def test_a_finding_knows_whether_it_is_in_its_band() -> None:
    assert Finding("a", 5.0, 4.0, "").met is None
    assert Finding("a", 5.0, 4.0, "", low=5.0).met is True
    assert Finding("a", 5.0, 4.0, "", high=4.9).met is False
    assert Finding("a", 5.0, 4.0, "", 3.0, 6.0).met is True


def test_swapping_small_blocks_loses(cache: RunCache) -> None:
    assert outside(paper.figure_19(cache)) == []


# --- sharing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "samples", "published"), [("alpaca", 2, 6.09), ("sharegpt", 2, 16.2)])
def test_samples_save_what_the_paper_says(name: str, samples: int, published: float) -> None:
    saved = 100 * samples_saving(generated(name, 150), samples)
    assert abs(saved - published) <= paper.SAMPLES_POINTS


def test_samples_share_as_in_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop without a model, against a real run of the embedded model with n = 3."""
    monkeypatch.setattr(sharing, "SAMPLE_EVERY", 1)
    monkeypatch.setattr(sharing, "MAX_SEQUENCES", 12)
    trace = RequestTrace(
        "t", tuple(TraceRequest(0.0, p, o) for p, o in ((20, 9), (5, 14), (33, 1), (8, 20))), timed=False
    )
    num_slots = 12 * (34 // 4 + 2) * 4
    ran = Saving(num_slots)
    llm = LLM(
        "tiny", kv_cache_tokens=num_slots, block_size=4, watermark=0.0, max_batch_tokens=2048, max_batch_seqs=12,
        on_step=lambda record: ran.sample(record.snapshot), backend="reference", max_model_len=128,
    )  # fmt: skip
    for number, each in enumerate(trace.requests):
        prompt = token_ids(each.prompt_len, (), 1, number, llm.config.vocab_size)
        llm.add_request(prompt, SamplingParams(max_tokens=each.output_len, n=3, temperature=1.0, ignore_eos=True))
    while llm.has_unfinished:
        llm.step()
    assert samples_saving(trace, 3, block_size=4) == pytest.approx(ran.share, abs=1e-12)
    assert ran.share > 0.1


def test_beams_share_more_than_samples_and_less_than_all() -> None:
    trace = RequestTrace("t", (TraceRequest(0.0, 20, 30), TraceRequest(0.0, 9, 25)), timed=False)
    samples, beams = samples_saving(trace, 4, block_size=4), beams_saving(trace, 4, block_size=4)
    assert samples < beams < 0.75  # of four copies, three can be saved
