"""Lesson 18: claims under test

Question: what is true of what people say about PagedAttention?
Time: 20 minutes. Needs lesson 17.

This project began with an article that recommends PagedAttention. Here are
its claims in our words, each with a small measurement, and with the command
that makes the large one.
"""

from dataclasses import replace
from inspect import getsource

import numpy as np

from paged_ref.kernels import naive_attention, paged_attention
from paged_ref.kernels.trace import recording
from paged_ref.lesson import break_it, check, claim
from paged_ref.lesson import predict, table, todo
from paged_ref.memory import paged, standard, swapping
from paged_ref.workload.hardware import GPUS
from paged_ref.workload.models import MODELS
from paged_ref.workload.roofline import num_kv_tokens
from paged_ref.workload.setup import Setup
from paged_ref.workload.simulate import Simulation
from paged_ref.workload.traces import Trace, TraceRequest, generated

# ## Predict
#
# Nine claims: on memory, on what is read, on what it is good for.

true = predict("How many of nine are true as they stand?", "claims")
false = predict("And how many are false?", "claims")
verdicts = []


def verdict(said, word, command, found, holds):
    verdicts.append((said, word, command))
    claim(f"{said}: {word.upper()}. {found}", bool(holds))


# ## Run
#
# The same requests, all at once, under three managers, for OPT-13B on a GPU
# of 40 GB. Scheduler and managers are the real ones, the clock a roofline.

SETUP = Setup("OPT", GPUS["A100-40GB"], MODELS["OPT-13B"])
MIXED = generated("sharegpt", 80)
LONG = Trace("long", (TraceRequest(0.0, 1024, 1024),) * 24, timed=True)


def serve(trace):
    ways = [replace(SETUP, manager="standard"), SETUP]
    ways[1:1] = [replace(SETUP, manager="swapping", preemption="swap")]
    runs = [Simulation(way, trace).run() for way in ways]
    return runs, np.array([run.requests_per_second for run in runs])


# Only last blocks have empty slots. So more requests run, which helps while
# memory is what lacks. Where every one fills its reservation, little is
# won: what pays is not length, but lengths that differ and are not known
# before.

runs, rates = serve(MIXED)
used = np.array([run.shares.tokens_of_used for run in runs])
gain, long = (its[2] / its[0] for its in (rates, serve(LONG)[1]))
lines = [
    len(getsource(m).splitlines()) for m in (standard, swapping, paged)
]

verdict("memory use: poor, moderate, high", "true", "compare",
        used.round(2), (np.diff(used) > 0).all())  # fmt: skip
verdict("it scales best of the three", "true, if", "compare",
        f"requests/s {rates.round(2)}", rates.argmax() == 2)  # fmt: skip
verdict("long sequences gain most", "false", "compare --trace",
        f"mixed x{gain:.2f}, long x{long:.2f}", gain > long)  # fmt: skip
verdict("complexity: low, medium, high", "true", "compare",
        f"lines {lines}", sorted(lines) == lines)  # fmt: skip

# ## What is read
#
# The last run again, and the kernels in the tracer. Who gave way was
# computed again: nothing moved. (With swap, whole sequences do.) No key is
# left out, either: to read only pages that matter (lesson 15) is another
# method, which pages make easy. A token costs what it did; larger batches
# are what helps.

draw = np.random.default_rng(0).standard_normal
query, cache = draw((1, 4, 8), "f"), draw((8, 4, 2, 8), "f")
rows, length = cache.reshape(32, 2, 8), np.array([14])
tables, start = np.array([[5, 2, 7, 0]]), np.array([3])
with recording(8) as traces:
    naive_attention(query, rows, rows, start, length, backend="trace")
    paged_attention(query, cache, cache, tables, length, backend="trace")
before, now = (trace.counts("keys") for trace in traces)
moved = runs[2].bytes_moved + runs[2].bytes_swapped
found = f"{moved} bytes moved, {runs[2].preemptions} gave way"

verdict("data moves out and in by need", "false", "generate --record",
        found, moved == 0)  # fmt: skip
verdict("only the most relevant is read", "false", "walk",
        f"{(now > 0).sum()} numbers, {now.max()} times for two heads",
        (now == 2).sum() == 14 * 2 * 8)  # fmt: skip
verdict("computing is more efficient", "true, if", "compare",
        f"K read: {before.sum()}, paged {now.sum()}",
        before.sum() == now.sum())  # fmt: skip

# ## What it is good for
#
# Pages hold K and V; the weights stay as large as they are. And lesson 17
# has counted what it takes to bring a model of your own to pages.

try:
    found = f"room for {num_kv_tokens(SETUP.gpu, MODELS['OPT-66B'])} tokens"
except ValueError as error:
    found = str(error)
verdict("models larger than the GPU run", "false", "assess",
        found, "of weights" in found)  # fmt: skip
table("The claims", ("claim", "verdict", "paged-ref"), verdicts)
true.grade(sum(word == "true" for _, word, _ in verdicts))
false.grade(sum(word == "false" for _, word, _ in verdicts))

# ## What must hold
#
# A test of a claim must be able to fail. Which claim falls here?

break_it(
    "pages as large as the longest sequence",
    where=(Setup, "make_manager"),
    bug=lambda real: lambda self: real(replace(self, block_size=2048)),
    run=lambda: serve(MIXED)[0][2].shares.tokens_of_used,
    caught_by="contract",
)  # fmt: skip

# ## Exercise
#
# The first claim, by yourself: of the slots that sequences of these lengths
# hold in blocks of `size`, which share holds a token?


def my_share(lengths, size):
    return todo("2 lines")


def spec(lengths, size):
    manager = paged.PagedManager(99, size)
    for seq, length in enumerate(lengths):
        manager.admit(seq, range(length), length)
        manager.append([(seq, length)])
    usage = manager.snapshot().usage({})
    return usage.tokens / (usage.total - usage.free)


cases = [([3, 40, 17], 16), ([16, 32], 16), ([1] * 9, 4)]
hint = "Tokens over slots, each summed first; a block is held whole."
check(my_share, spec=spec, cases=cases, hint=hint)

# ## In production systems
#
# The paper's own figures are of this kind: 20.4% to 38.2% of the memory
# held tokens before, 96.3% with vLLM (Kwon et al. 2023, §1, Fig. 2).

# ## Next
#
# Yours: `paged-ref assess` for your model, GPU and traffic.
