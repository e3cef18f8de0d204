"""Rates, predictions and the rows of the comparison: what must hold of them, and how a rate is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import SHARED

from paged_ref.planner.assess import predict
from paged_ref.planner.comparison import check, longest_request, row_of, setups, small
from paged_ref.planner.hardware import gpu_named
from paged_ref.planner.metrics import Outcome
from paged_ref.planner.models import model_named
from paged_ref.planner.paper import ORCA, PAGED
from paged_ref.planner.setup import Setup
from paged_ref.planner.simulate import Simulation
from paged_ref.planner.sweep import AT_ONCE, curve_of, curves_of, run_once
from paged_ref.planner.trace_files import read_trace
from paged_ref.planner.traces import RequestTrace, TraceRequest, at_rate, first, generated

BOUND = 0.2


# --- the paper's claims, on requests with ShareGPT's means ---------------------------------------------


@pytest.mark.parametrize(("reserve", "times"), [("exact", 1.7), ("max", 2.7)])
def test_paged_serves_the_papers_multiple_of_the_rate(reserve: str, times: float) -> None:
    """With the allocator that the paper assumes of the others, and at no higher latency than they have."""
    trace = generated("sharegpt", 600)
    (curve,) = curves_of([ORCA[reserve]], trace, BOUND, num_jobs=1)
    assert run_once(PAGED, trace, times * curve.rate).normalised <= BOUND
    assert curve.rate in [point.rate for point in curve.points]
    assert all(point.outcome.normalised <= BOUND for point in curve.points if point.rate <= curve.rate)
    above = [point for point in curve.points if point.rate > curve.rate]
    assert above[0].rate < 1.05 * curve.rate  # the next that was tried, and did not hold, is near
    assert above[0].outcome.normalised > BOUND


def test_paged_memory_holds_tokens_and_reserved_memory_does_not() -> None:
    trace = at_rate(generated("sharegpt", 600), AT_ONCE)
    outcomes = {name: Simulation(setup, trace).run() for name, setup in {**ORCA, "paged": PAGED}.items()}
    assert outcomes["paged"].shares.occupancy >= 0.95
    assert outcomes["max"].shares.occupancy < 0.40
    for outcome in outcomes.values():
        assert outcome.finished == 600
        shares = outcome.shares
        assert shares.used + shares.cached + shares.free == pytest.approx(1.0)


def test_prompts_decide_on_azures_conversations() -> None:
    """Llama-3-8B on 80 GB: on paper its steps wait for the prompts' arithmetic with any reservation that holds
    more than 57 sequences. So exact is worth as much as paged, though paged holds the same in less memory."""
    path = SHARED / "traces" / "azure2023_conv.csv.gz"
    if not path.is_file():
        pytest.skip("no ../shared/traces/azure2023_conv.csv.gz beside the project")
    trace = first(read_trace(path), 1500)
    paged = Setup("paged", gpu_named("A100-80GB"), model_named("Llama-3-8B"))
    exact = replace(paged, manager="standard", reserve="exact")
    predicted = predict(paged, trace)
    assert predicted.step.bound == "compute"
    assert predicted.requests_per_second / predict(exact, trace).requests_per_second == pytest.approx(1.0, abs=0.02)
    rates = [run_once(setup, trace, AT_ONCE).requests_per_second for setup in (paged, exact)]
    assert rates[0] / rates[1] == pytest.approx(1.0, abs=0.02)


# --- rates and predictions -----------------------------------------------------------------------------


def test_a_rate_is_found_where_the_latency_crosses_the_bound() -> None:
    """On a made-up server whose latency is known: 0.05 s up to 8 requests per second, then it grows."""
    template = run_once(replace(PAGED, kv_tokens=4096), generated("alpaca", 20), AT_ONCE)

    def run(setup: Setup, trace: RequestTrace, rate: float) -> Outcome:
        latency = 0.05 + max(0.0, rate - 8.0)
        return replace(template, normalised=latency, seconds=template.finished / 10.0)

    curve = curve_of(PAGED, generated("alpaca", 20), BOUND, run)
    assert 8.15 - 0.12 <= curve.rate <= 8.15  # a 64th of the bracket, which is 7.5 to 15
    assert [point.rate for point in curve.points] == sorted(point.rate for point in curve.points)


@pytest.mark.parametrize(("name", "count"), [("sharegpt", 800), ("alpaca", 4000)])
def test_predictions_are_near_what_is_simulated(name: str, count: int) -> None:
    """On paper there are no holes and no preemptions, so a prediction is too high, but not by much."""
    trace = generated(name, count)
    for setup in (PAGED, ORCA["max"], ORCA["exact"]):
        measured = run_once(setup, trace, AT_ONCE)
        predicted = predict(setup, trace)
        assert predicted.sequences == pytest.approx(measured.running_short, rel=0.2)
        assert 0.95 < predicted.requests_per_second / measured.requests_per_second < 1.35


def test_what_can_never_fit_is_counted_with_its_reason() -> None:
    trace = RequestTrace("t", tuple(TraceRequest(0.0, p, 5) for p in (10, 3000, 40, 2048)), timed=True)
    outcome = run_once(PAGED, trace, 1.0)
    assert (outcome.finished, outcome.refused) == (2, 2)
    assert outcome.refusal == "the prompt has 3000 tokens; the context of 2048 has no room for more"
    pool = replace(PAGED, kv_tokens=32, max_model_len=2048)
    outcome = run_once(pool, trace, 1.0)
    assert (outcome.finished, outcome.refused) == (1, 3)
    assert "there are 32" in run_once(pool, RequestTrace("t", trace.requests[2:3], True), 1.0).refusal
    with pytest.raises(ValueError, match="none of the requests can be served"):
        curve_of(pool, RequestTrace("t", trace.requests[1:], True), BOUND)
    with pytest.raises(ValueError, match="none of the requests fits"):
        predict(PAGED, RequestTrace("t", trace.requests[1:2], True))


# --- rows ----------------------------------------------------------------------------------------------


def test_the_rows_and_what_they_can_hold() -> None:
    base = replace(PAGED, kv_tokens=4000, model=model_named("Llama-2-13B"))
    rows = {setup.label: setup for setup in setups(base, [16, 128])}
    assert list(rows) == [
        "standard max", "standard pow2", "standard exact", "exact, first fit", "swapping",
        "paged 16", "paged 128", "paged 16 + prefix",
    ]  # fmt: skip
    longest = {label: longest_request(setup.make_manager(), 4096) for label, setup in rows.items()}
    # A pool of 4000 has no piece larger than 2048; a region or blocks may take all, and the last token needs no slot.
    assert longest["standard exact"] == 2049
    assert longest["exact, first fit"] == longest["swapping"] == longest["paged 16"] == 4001
    assert longest["paged 128"] == 31 * 128 + 1


def test_a_row_in_json() -> None:
    trace = generated("alpaca", 60)
    curve = curve_of(replace(PAGED, kv_tokens=2048), trace, BOUND)
    row = row_of(curve, trace).to_json()
    assert row["at_once"]["finished"] == 60
    assert 0.5 < row["at_once"]["tokens_of_used"] < 1
    assert len(row["points"]) == len(curve.points)


def test_the_embedded_model_runs_as_simulated() -> None:
    base = replace(PAGED, max_batch_tokens=64)
    rows = [each for each in setups(base, [4]) if each.label in ("standard exact", "swapping", "paged 4")]
    trace = small(generated("sharegpt", 12))
    assert max(each.prompt_len + each.output_len for each in trace.requests) <= 256
    seen: list[str] = []
    checked = check(rows, trace, seen.append)
    assert seen == [row.label for row in rows]
    assert all(each.same and each.steps and each.simulated == each.ran for each in checked)
