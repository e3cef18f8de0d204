"""What to expect, on paper, before anything runs: from a trace's lengths, the pool and the roofline.

A memory manager decides how many sequences run at once; the roofline says what that is worth. Where steps wait
for weights and K and V to be read, twice the sequences are nearly twice the requests; where they wait for the
arithmetic of prompts, more sequences at once bring nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from .roofline import Bound, step_time
from .setup import Setup
from .traces import RequestTrace


@dataclass(frozen=True, slots=True)
class Prediction:
    """One setup, kept as full as its memory allows."""

    slots_each: float  # that a running sequence takes from the pool, on average over time
    num_running: float
    rate: float  # requests per second
    bound: Bound  # what its steps wait for


def predict(setup: Setup, trace: RequestTrace) -> Prediction:
    """The steady state. Requests that never fit are left out; so are holes, preemptions, and prefix hits.

    A sequence is there for as many steps as it has output tokens, so an average over time weighs by these:
    long outputs count more often than they come.
    """
    manager = setup.make_manager()
    longest = setup.longest
    each = [(r.prompt_len, min(r.output_len, longest - r.prompt_len)) for r in trace.requests if r.prompt_len < longest]
    if not each:
        raise ValueError(f"none of the requests fits in a context of {longest}")
    prompts, outputs = sum(prompt for prompt, _ in each), sum(output for _, output in each)
    tokens = sum(output * (prompt + output / 2) for prompt, output in each) / outputs  # held, half way through
    if setup.manager == "standard":  # its whole region, all the time
        slots = sum(output * manager.max_slots_needed(prompt, prompt + output - 1) for prompt, output in each) / outputs
    else:  # half of the last block, or of the granule, is empty
        slots = tokens + (setup.block_size if setup.manager == "paged" else 16) / 2
    running = max(1.0, min(setup.max_batch_seqs, setup.num_slots / slots))
    if setup.manager == "standard":
        running = float(int(running)) if setup.reserve == "max" else running
    # In each step every sequence gets a token, and as many prompts are computed as outputs end.
    prompt_tokens = running * prompts / outputs
    pairs = running * (tokens + sum(prompt * prompt / 2 for prompt, _ in each) / outputs)
    time = step_time(
        setup.gpu,
        setup.model,
        round(running + prompt_tokens),
        round(running * tokens + prompt_tokens),
        query_key_pairs=round(pairs),
        num_logits=round(running),
        constants=setup.constants,
    )
    seconds = time.seconds
    rate = running / (outputs / len(each)) / seconds if seconds else inf
    return Prediction(slots, running, rate, time.bound)
