"""Lesson 18: claims under test

Question: what is true of what people say about PagedAttention?
Time: 20 minutes. Needs lesson 17.

This project began with an article that recommends PagedAttention. Here are
its claims in our words, each measured, and the commands that measure more.
"""

from dataclasses import replace
from inspect import getsource
from pathlib import Path

import numpy as np

from paged_ref.kernels import naive_attention, paged_attention
from paged_ref.kernels.trace import recording
from paged_ref.lesson import break_it, check, claim, predict, table, todo
from paged_ref.memory import paged, standard, swapping
from paged_ref.training import network
from paged_ref.workload import hardware, models, setup, simulate, traces

# ## Predict
#
# Ten claims: on memory, on what is read, on what it is good for.

true = predict("How many of ten are true as they stand?", "claims")
false = predict("And how many are false?", "claims")
COMMANDS = "compare compare compare compare generate walk compare assess"
COMMANDS = [*COMMANDS.split(), "train", "lesson 17"]
verdicts = []


def judge(word, said, what, found, expected=True):
    claim(f"{said}: {word.upper()} ({what})", found, expected)
    verdicts.append((said, word, COMMANDS[len(verdicts)]))


# ## Run
#
# The same requests, all at once, under three managers, for OPT-13B on a GPU
# of 40 GB. Scheduler and managers are the real ones, the clock a roofline.

GPU, OPT = hardware.GPUS["A100-40GB"], models.MODELS["OPT-13B"]
WAYS = [setup.Setup("", GPU, OPT, way) for way in ("standard", "paged")]
WAYS[1:1] = [replace(WAYS[0], manager="swapping", preemption="swap")]
MIXED = traces.generated("sharegpt", 80)
LONG = traces.Trace("", (traces.TraceRequest(0, 1024, 1024),) * 24, True)


def serve(trace):
    return [simulate.Simulation(way, trace).run() for way in WAYS]


runs = serve(MIXED)
used = [round(run.shares.tokens_of_used, 2) for run in runs]
mixed = [run.requests_per_second for run in runs]
long = [run.requests_per_second for run in serve(LONG)]
files = standard, swapping, paged
lines = [len(getsource(file).splitlines()) for file in files]
rows = [("held slots with a token", *used), ("lines of code", *lines)]
rows += [("requests/s", *mixed), ("requests/s, all longest", *long)]
table("Measured", ("", "standard", "swapping", "paged"), rows)

# Only last blocks have empty slots. So more requests run, which helps while
# memory is what lacks. If each fills its reservation, little is won: not
# length pays, but lengths that differ and are not known before.

gain = mixed[2] / mixed[0] > long[2] / long[0]
judge("true", "poor, moderate, high use", "share", used, sorted(used))
judge("true, if", "it scales best", "requests/s", max(mixed) == mixed[2])
judge("false", "long sequences gain most", "the others do", gain)
judge("true", "low, medium, high complexity", "lines", lines, sorted(lines))

# ## What is read
#
# Who gave way in that run was computed again: nothing moved. (With swap,
# whole sequences do.) No key is left out; to read only pages that matter is
# another method (lesson 15). A token costs what it did. Batches grow.

query, cache = np.ones((1, 4, 8), "f"), np.ones((8, 4, 2, 8), "f")
rows, length = cache.reshape(32, 2, 8), np.array([14])
blocks, start = np.array([[5, 2, 7, 0]]), np.array([3])
with recording(8) as kernels:
    naive_attention(query, rows, rows, start, length, backend="trace")
    paged_attention(query, cache, cache, blocks, length, backend="trace")
naive, pages = (kernel.counts("keys") for kernel in kernels)
read = np.count_nonzero(pages.any(axis=(1, 2)))
moved = runs[2].bytes_swapped
judge("false", "data moves in and out by need", "bytes", moved, 0)
judge("false", "only what is relevant is read", "keys of 14", read, 14)
reads = naive.sum(), pages.sum()
judge("true, if", "computing is more efficient", "reads", *reads)

# ## What it is good for
#
# Weights stay as large as they are, and training has no cache to page.

room = GPU.memory_bytes - models.MODELS["OPT-66B"].weight_bytes
calls = getsource(network).count("paged_attention")
steps = len(list((Path(__file__).parent / "refactor").glob("step[1-5]*")))
judge("false", "models larger than the GPU run", "room", room < 0)
judge("false", "training is managed by it", "calls of it", calls, 0)
judge("true", "your model can move over", "steps", steps, 5)
table("The claims", ("claim", "verdict", "paged-ref"), verdicts)
true.grade(sum(word == "true" for _, word, _ in verdicts))
false.grade(sum(word == "false" for _, word, _ in verdicts))

# ## What must hold
#
# A test of a claim must be able to fail. Which claim falls here?

break_it(
    "pages as large as the longest sequence",
    where=(setup.Setup, "make_manager"), caught_by="contract",
    bug=lambda real: lambda self: real(replace(self, block_size=2048)),
    run=lambda: serve(MIXED)[2].shares.tokens_of_used,
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
    its = manager.snapshot().usage({})
    return its.tokens / (its.total - its.free)


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
