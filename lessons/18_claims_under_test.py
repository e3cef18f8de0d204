"""Lesson 18: claims under test

Question: what is true of what people say about PagedAttention?
Time: 20 minutes. Needs lesson 17.

This project began with an article that recommends PagedAttention. This
lesson states eight claims of the article in our words, and measures each.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from paged_ref import LLM
from paged_ref.core.memory.block_pool import BlockPool
from paged_ref.core.memory.paged import PagedManager
from paged_ref.core.memory.standard import StandardManager
from paged_ref.kernels import paged_attention
from paged_ref.tracer import trace
from paged_ref.lesson import break_it, check, claim, predict, show, todo
from paged_ref.training import activations, network, parameters
from paged_ref.planner import hardware, models, setup, steady, traces

# ## Predict
#
# The article compares three ways to manage K and V: standard memory, which
# reserves (lesson 3), swapping (lesson 4), and paging. "It" is paging. A
# verdict is "true" (1), "true, if" (2: true on a condition) or "false" (3).
# What is yours? Below, each verdict has a reason, our measurement, and the
# command that tests the claim at length.

CLAIMS = {
    "memory": "In this order, memory use is poor, moderate, high",
    "scale": "Paging scales best of the three",
    "compute": "Computing becomes more efficient",
    "long": "Long sequences gain most",
    "moves": "Pages are moved in and out as needed",
    "relevant": "Only the most relevant is read",
    "training": "It manages memory in training",
    "adopt": "Models can be moved to it, with some work",
}
VERDICTS = {"true": 1, "true, if": 2, "false": 3}
guesses = {
    name: predict(f"{said}. 1 true, 2 if, 3 false?", among=(1, 2, 3))
    for name, said in CLAIMS.items()
}


def verdict(word, name, command, found, holds, why):
    claim(f"{word.upper()}. {CLAIMS[name]}", holds)
    here = f"Here: {found}. At length: paged-ref {command}"
    guesses[name].grade(VERDICTS[word], why=f"{why}. {here}")


# ## Run
#
# The same requests, one always waiting, under each manager, for OPT-13B on
# a GPU of 40 GB, as `paged-ref compare` measures. The scheduler and the
# managers are real; the clock is a forecast.

MIXED = traces.generated("sharegpt")
REQUEST = traces.TraceRequest(0, 1024, 1024)
LONGEST = traces.RequestTrace("", (REQUEST,), timed=False)
GPU, OPT = hardware.GPUS["A100-40GB"], models.MODELS["OPT-13B"]


def serve(manager, requests, preemption="recompute"):
    way = setup.Setup("", GPU, OPT, manager, preemption=preemption)
    return steady.steady_state(way, requests)


def gain(requests):
    way = setup.Setup("", GPU, OPT, "standard", "exact", "buddy")
    exact = steady.steady_state(way, requests)
    return round(
        serve("paged", requests).sustained_rate / exact.sustained_rate, 2
    )


WAYS = {"standard": "recompute", "swapping": "swap", "paged": "recompute"}
show(f"  In this order: {', '.join(WAYS)}.\n")
mixed = [serve(name, MIXED, way) for name, way in WAYS.items()]
long = [serve(name, LONGEST, way) for name, way in WAYS.items()]
used = [round(run.outcome.shares.occupancy, 2) for run in mixed]
rate = [round(run.sustained_rate, 2) for run in mixed]
long = [round(run.sustained_rate, 2) for run in long]
tokens = [round(run.outcome.running_mean) for run in mixed]
# fmt: off
verdict("true", "memory", "compare",
    f"{used} of held slots have a token", used == sorted(used),
    "only the last block of a sequence has empty slots")
verdict("true, if", "scale", "compare",
    f"{rate} requests/s", rate[2] == max(rate),
    "more sequences fit, which helps where memory is the bottleneck")
verdict("true, if", "compute", "compare",
    f"{tokens} new tokens in a step", tokens[2] == max(tokens),
    "a step reads the weights for more sequences; a token costs the same")
short, mean = gain(traces.generated("alpaca")), gain(MIXED)
verdict("true, if", "long", "paper 12",
    f"{short} times for short ones, {mean} for longer, against exact",
    short < mean and long[2] / long[0] < rate[2] / rate[0],
    "as the paper says, memory limits long ones more; but if all have the "
    f"length that is reserved, little is wasted: {long} requests/s")

# ## What moves, what is read, what trains
#
# Lessons 15 and 16 load pages when they are needed, choose keys, and train
# in pages. These are uses of pages in this package, and not what servers
# call PagedAttention.

swap = serve("paged", MIXED, "swap").outcome.bytes_swapped
verdict("false", "moves", "long",
    f"no byte, or {swap:,} with swap",
    mixed[2].outcome.bytes_swapped == 0 and swap > 0,
    "running sequences stay; swap moves waiting ones; `long` moves pages")
query, cache = np.ones((1, 4, 8), "f"), np.ones((8, 4, 2, 8), "f")
blocks, length = np.array([[5, 2, 7, 0]]), np.array([14])
with trace.recording(8) as kernels:
    paged_attention(query, cache, cache, blocks, length, backend="trace")
read = int((kernels[0].counts("keys").sum((1, 2)) > 0).sum())
verdict("false", "relevant", "long --attend 0.1",
    f"{read} of 14 keys are read", read == 14,
    "attention is exact; `long` can choose, and changes answers")

config, saved = LLM("tiny").config, activations.Keep()
weights, gradient = [parameters.Parameters(config) for _ in range(2)]
weights.initialize(seed=0)
batch = network.PackedBatch.of([np.arange(33)])
network.loss_and_gradient(weights, gradient, batch, saved)
shapes = network.saved_shapes(config, 32).values()
planned = 4 * config.num_layers * sum(int(np.prod(s)) for s in shapes)
verdict("false", "training", "lesson 16",
    f"{planned:,} bytes, as planned", saved.counts.peak == planned,
    "sizes are known, no cache grows; lesson 16 pages other data")

sys.path.append(str(Path(__file__).parent / "start_here"))
import run as start_here  # noqa: E402
before, after = (
    start_here.token_ids(n, "tiny", [[5, 6]], 8) for n in (0, 5)
)
diffs = [start_here.diff(n) for n in range(1, 6)]
lines = [start_here.count_changes(diff)[1] for diff in diffs]
verdict("true", "adopt", "lesson 17",
    f"the same tokens; {lines} new lines in five steps", before == after,
    "only the cache and attention change (lessons/start_here/run.py)")

# ## What must hold
#
# A test of a claim must be able to fail. Which claim fails here?

break_it(
    "blocks as large as the longest sequence: how many run together",
    where=(setup.Setup, "make_manager"), caught_by="contract",
    bug=lambda real: lambda self: real(replace(self, block_size=2048)),
    run=lambda: serve("paged", MIXED).outcome.running_peak,
    text=lambda most: f"{most} sequences run together",
)

# ## Exercise
#
# Test the fourth claim yourself. Sequences of these `lengths` are in memory
# together. Divide the slots that they hold if each reserves `longest` slots
# by the slots that they hold in blocks of `size` slots.


def my_ratio(lengths, longest, size):
    return todo("3 lines")


def spec(lengths, longest, size):
    held = []
    blocks = PagedManager(BlockPool(999), size)
    for memory in (StandardManager(9999, longest), blocks):
        for seq, length in enumerate(lengths):
            memory.admit(seq, range(length), length)
            memory.append([(seq, length)])
        held.append(memory.num_slots - memory.snapshot().free)
    return held[0] / held[1]


cases = [([3, 40, 17], 64, 16), ([64, 64], 64, 16), ([1] * 9, 32, 4)]
hint = (
    "A sequence holds whole blocks.\n"
    "Round each length up to full blocks, and add them up."
)
check(my_ratio, spec=spec, cases=cases, hint=hint)

# ## In production systems
#
# The paper's figures: 20.4% to 38.2% of the memory held tokens, 96.3% with
# vLLM (Kwon et al. 2023, Fig. 2). `paged-ref paper` shows ours beside them.

# ## Next
#
# See it move: `paged-ref compare`, the first four claims at length.
#
# Lesson 19: how large a block should be.
