"""Rates, goodput and the rows of the comparison: what must hold of them, and how goodput is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import SHARED

from paged_ref.planner import sweep
from paged_ref.planner.comparison import able, check, setups, small
from paged_ref.planner.hardware import gpu_named
from paged_ref.planner.metrics import Latency, Limits, Spread
from paged_ref.planner.models import model_named
from paged_ref.planner.paper import FIG_12, ORCA, PAGED
from paged_ref.planner.setup import Setup
from paged_ref.planner.simulate import Simulation, simulated
from paged_ref.planner.steady import steady_state
from paged_ref.planner.sweep import LOADS, Point, curves_of, goodput, run_at
from paged_ref.planner.trace_files import trace_named
from paged_ref.planner.traces import RequestTrace, TraceRequest, at_rate, generated
from paged_ref.planner.workers import Workers

HERE = Workers(1)


# --- the paper's claims, on requests with ShareGPT's means ---------------------------------------------


@pytest.mark.parametrize("reserve", ["exact", "max"])
def test_paged_sustains_the_papers_multiple_of_the_rate(reserve: str) -> None:
    """With the allocator that the paper assumes of the others."""
    trace = generated("sharegpt")
    low, high = FIG_12["sharegpt", reserve]
    paged, other = (steady_state(setup, trace).sustained_rate for setup in (PAGED, ORCA[reserve]))
    assert low <= paged / other <= high


def test_paged_memory_holds_tokens_and_reserved_memory_does_not() -> None:
    trace = generated("sharegpt", 600)
    outcomes = {name: steady_state(setup, trace).outcome for name, setup in {**ORCA, "paged": PAGED}.items()}
    assert outcomes["paged"].shares.occupancy >= 0.95
    assert outcomes["max"].shares.occupancy < 0.40
    for outcome in outcomes.values():
        shares = outcome.shares
        assert shares.used + shares.cached + shares.free == pytest.approx(1.0)
        assert outcome.waiting_share == pytest.approx(1.0)


def test_prompts_decide_on_azures_conversations() -> None:
    """Llama-3-8B on 80 GB: steps wait for the prompts' arithmetic with any reservation that holds more than 57
    sequences. So exact is worth nearly as much as paged, though paged holds the same in less memory."""
    path = SHARED / "traces" / "azure2023_conv.csv.gz"
    if not path.is_file():
        pytest.skip("no ../shared/traces/azure2023_conv.csv.gz beside the project")
    trace = trace_named(str(path), 1500)
    paged = Setup("paged", gpu_named("A100-80GB"), model_named("Llama-3-8B"))
    found = [steady_state(setup, trace) for setup in (paged, replace(paged, manager="standard", reserve="exact"))]
    assert all(each.step.bound == "compute" for each in found)
    assert found[0].sustained_rate / found[1].sustained_rate == pytest.approx(1.0, abs=0.05)


# --- latency and goodput -------------------------------------------------------------------------------


def test_percentiles_are_values_that_so_many_do_not_exceed() -> None:
    assert Spread.of(range(1, 101)) == Spread(50.5, 50, 90, 99)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 3.0)
    assert Spread.of([]) == Spread(0.0, 0.0, 0.0, 0.0)


def test_a_request_meets_all_limits_or_none() -> None:
    request = Latency(0, first_token=1.0, each_token=0.05, normalised=0.1)
    assert not Limits()
    assert Limits(ttft=1.0, tpot=0.05, latency=0.1).met_by(request)
    for limits in (Limits(ttft=0.9), Limits(tpot=0.04), Limits(latency=0.09)):
        assert limits
        assert not limits.met_by(request)
    assert Limits(tpot=0.01).met_by(replace_each(request))  # one token has none after it
    ten = [request._replace(each_token=tpot) for tpot in range(1, 11)]
    assert [Limits(share=share).tpot_met(ten) for share in (0.5, 0.9, 0.91, 1.0)] == [5, 9, 10, 10]
    assert Limits().tpot_met([replace_each(request)]) == 0.0
    assert Limits(ttft=1.0).share_met([request, request._replace(first_token=2.0)]) == 0.5
    assert Limits(ttft=1, tpot=0.05, share=0.9).describe() == (
        "first token within 1 s, each further token 0.05 s, for 90 % of the requests"
    )


def replace_each(request: Latency) -> Latency:
    return request._replace(each_token=None)


def test_goodput_is_found_where_the_limits_are_crossed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a made-up server that meets the limits up to 0.5 requests per second."""
    steady = steady_state(replace(PAGED, kv_tokens=4096), generated("alpaca", 20))
    outcome = steady.outcome
    monkeypatch.setattr(sweep, "run_at", lambda setup, trace, rate, limits: Point(rate, outcome, 1.0 * (rate <= 0.5)))
    found = goodput(steady, generated("alpaca", 20), Limits(ttft=1.0))
    assert found.rate <= 0.5 < found.above
    assert found.above - found.rate <= sweep.MOST_LOAD * steady.sustained_rate / 2**sweep.HALVINGS * 1.001
    assert found.at is not None
    assert found.at.rate == found.rate
    monkeypatch.setattr(sweep, "run_at", lambda setup, trace, rate, limits: Point(rate, outcome, 1.0))
    lax = goodput(steady, generated("alpaca", 20), Limits(ttft=1.0))  # nearer to the rate, no run is long enough
    assert (lax.rate, lax.above) == (sweep.MOST_LOAD * steady.sustained_rate, steady.sustained_rate)
    monkeypatch.setattr(sweep, "run_at", lambda setup, trace, rate, limits: Point(rate, outcome, 0.0))
    none = goodput(steady, generated("alpaca", 20), Limits(ttft=1e-9))
    assert (none.rate, none.at) == (0.0, None)


def test_a_run_is_long_for_the_requests_that_run_together() -> None:
    """In 1,000 requests on a server for 256 sequences, fewer than a half of these ever ran: every request was fast, and
    goodput with a first token within 1 s was the sustained rate itself."""
    trace = RequestTrace("t", (TraceRequest(0.0, 4, 200),) * 50, timed=False)
    many = replace(PAGED, kv_tokens=100_000)
    point = run_at(many, trace, 60.0)
    assert point.outcome.running_peak == 256
    assert point.outcome.finished >= 13 * 256
    assert run_at(many, trace, 5.0).outcome.finished == sweep.LEAST_REQUESTS


@pytest.mark.slow
def test_tighter_limits_give_less_goodput_and_never_more_than_is_sustained() -> None:
    trace = generated("sharegpt", 200)
    limits = [Limits(), Limits(ttft=20.0), Limits(ttft=1.0), Limits(ttft=1.0, tpot=0.04)]
    rates = [curves_of([PAGED], trace, each, workers=HERE)[0].rate for each in limits]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < rates[0]


def test_latency_rises_with_the_load_and_the_warm_up_is_left_out() -> None:
    trace = generated("sharegpt", 300)
    (curve,) = curves_of([ORCA["max"]], trace, workers=HERE)
    assert [point.rate / curve.steady.sustained_rate for point in curve.points] == pytest.approx(LOADS)
    waits = [point.outcome.first_token.p90 for point in curve.points]
    assert waits == sorted(waits)
    assert curve.shown is curve.points[LOADS.index(0.8)]
    point = run_at(PAGED, trace, 0.1)
    assert point.outcome.finished == 1200  # four passes
    whole = Simulation(PAGED, trace, num_warm_up=100)
    whole.run()
    assert min(each.place for each in whole.tally.latencies) == 100
    assert len(whole.tally.latencies) == 200


def test_what_can_never_fit_is_counted_with_its_reason() -> None:
    trace = RequestTrace("t", tuple(TraceRequest(0.0, p, 5) for p in (10, 3000, 40, 2048)), timed=True)
    found = steady_state(PAGED, trace)
    assert (found.num_requests, found.num_refused) == (2, 2)
    assert found.refusal == "the prompt has 3000 tokens; the context of 2048 has no room for more"
    pool = replace(PAGED, kv_tokens=32, max_model_len=2048)
    found = steady_state(pool, trace)
    assert (found.num_requests, found.num_refused) == (1, 3)
    assert (
        "the cache has 32"
        in steady_state(pool, RequestTrace("t", (trace.requests[0], trace.requests[2]), True)).refusal
    )
    with pytest.raises(ValueError, match=r"none of the requests can be served\. the prompt has 3000 tokens"):
        steady_state(pool, RequestTrace("t", trace.requests[1:], True))


# --- rows ----------------------------------------------------------------------------------------------


def test_the_rows_and_what_they_can_hold() -> None:
    base = replace(PAGED, kv_tokens=4000, model=model_named("Llama-2-13B"))
    rows = {setup.label: setup for setup in setups(base, [16, 128])}
    assert list(rows) == [
        "standard max", "standard pow2", "standard exact", "exact, first fit", "swapping",
        "paged 16", "paged 128", "paged 16 + prefix",
    ]  # fmt: skip
    longest = {label: setup.longest_request() for label, setup in rows.items()}
    # A pool of 4000 has no piece larger than 2048; a region or blocks may take all, and the last token needs no slot.
    assert longest["standard exact"] == 2049
    assert longest["exact, first fit"] == longest["swapping"] == longest["paged 16"] == 4001
    assert longest["paged 128"] == 31 * 128 + 1


def test_what_can_serve_no_request_is_left_out_and_said() -> None:
    """A pool of 40,000 tokens has no region of 65,536, which the buddy allocator would give to each sequence."""
    rows = setups(replace(PAGED, model=model_named("Llama-3.1-8B"), kv_tokens=40_000), [16])
    found, (sentence,) = able(rows, generated("sharegpt", 5))
    assert [row.label for row in found] == [row.label for row in rows if row.label != "standard max"]
    assert sentence.startswith("Left out: standard max: none of the requests can be served. a prompt of length ")
    with pytest.raises(ValueError, match="paged 16: none of the requests can be served"):
        able(rows, RequestTrace("t", (TraceRequest(0.0, 50_000, 5),), timed=False))


def test_a_row_in_json() -> None:
    trace = generated("alpaca", 60)
    (curve,) = curves_of([replace(PAGED, kv_tokens=2048)], trace, Limits(ttft=0.5), workers=HERE)
    row = curve.to_json()
    assert 0 < row["goodput"] <= row["sustained_rate"] <= row["roofline"]
    assert row["at"]["first_token"]["p99"] <= 0.6
    assert 0.5 < row["measured"]["tokens_of_used"] < 1
    assert len(row["points"]) == len(curve.points)
    assert set(row["measured"]["each_token"]) == {"mean", "p50", "p90", "p99"}
    (curve,) = curves_of([replace(PAGED, kv_tokens=2048)], trace, workers=HERE)
    assert curve.to_json()["goodput"] is None


def test_the_embedded_model_runs_as_simulated() -> None:
    base = replace(PAGED, max_batch_tokens=64)
    rows = [each for each in setups(base, [4]) if each.label in ("standard exact", "swapping", "paged 4")]
    trace = small(generated("sharegpt", 12))
    assert max(each.prompt_len + each.output_len for each in trace.requests) <= 256
    seen: list[str] = []
    checked = check(rows, trace, seen.append)
    assert seen == [row.label for row in rows]
    assert all(each.same and each.steps and each.simulated == each.ran for each in checked)


@pytest.mark.parametrize("kv_tokens", [100_000, 600])
def test_a_cache_that_can_find_nothing_is_left_out_and_changes_no_number(kv_tokens: int) -> None:
    """With little memory requests are preempted, and find their own blocks again."""
    trace = at_rate(generated("alpaca", 40), float("inf"))
    setup = replace(PAGED, prefix_cache=True, kv_tokens=kv_tokens)
    made: list[bool] = []

    def make(setup: Setup) -> Simulation:
        made.append(setup.prefix_cache)
        return Simulation(setup, trace)

    simulation, outcome = simulated(setup, trace, make)
    assert made == ([False] if kv_tokens > 600 else [False, True])
    assert (simulation.num_preempted > 0) == (kv_tokens == 600)
    expected = Simulation(setup, trace).run()
    for name in ("seconds", "steps", "normalised", "first_token", "each_token", "preemptions", "hit_rate"):
        assert getattr(outcome, name) == getattr(expected, name)
    assert outcome.shares.tokens == expected.shares.tokens
    assert outcome.shares.free + outcome.shares.cached == pytest.approx(expected.shares.free + expected.shares.cached)


@pytest.mark.parametrize("name", ["max_batch_tokens", "max_batch_seqs"])
def test_a_setup_that_runs_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is 0; at least 1 is needed$"):
        Setup("paged", gpu_named("A100-80GB"), model_named("Llama-3-8B"), **{name: 0})  # type: ignore[arg-type]
