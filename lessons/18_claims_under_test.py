"""Lesson 18: claims under test

Question: what is true of what people say about PagedAttention?
Time: 20 minutes. Needs lesson 17.

This project began with an article that recommends PagedAttention. Here are
its claims in our words, each measured.
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
# Ten claims: on memory, on what is read, on what it is good for. Beside
# each stands the command of `paged-ref` that measures it at length.

true = predict("How many of ten are true as they stand?", "claims")
false = predict("And how many are false?", "claims")
COMMANDS = "compare compare compare compare generate walk compare assess"
COMMANDS, words = [*COMMANDS.split(), "train", "lesson 17"], []


def judge(*claims):
    for word, said, why, found, expected in claims:
        said = f"{word.upper()}: {said} (test: {COMMANDS[len(words)]})."
        claim(f"{said}\n  {why}", found, expected)
        words.append(word)


# ## Run
#
# The same requests, all at once, under three managers, for OPT-13B on a GPU
# of 40 GB. Scheduler and managers are the real ones, the clock a roofline.

GPU, OPT = hardware.GPUS["A100-40GB"], models.MODELS["OPT-13B"]
WAYS = [setup.Setup("", GPU, OPT, way) for way in ("standard", "paged")]
WAYS[1:1] = [replace(WAYS[0], manager="swapping", preemption="swap")]
MIXED = traces.generated("sharegpt", 80)
LONG = traces.Trace("", (traces.TraceRequest(0, 1024, 1024),) * 24, True)
runs = [simulate.Simulation(way, MIXED).run() for way in WAYS]
used = [round(run.shares.tokens_of_used, 2) for run in runs]
mixed = [run.requests_per_second for run in runs]
long = [simulate.Simulation(way, LONG).run() for way in WAYS]
long = [run.requests_per_second for run in long]
files = standard, swapping, paged
lines = [len(getsource(file).splitlines()) for file in files]
rows = [("held slots with a token", *used), ("lines of code", *lines)]
rows += [("requests/s", *mixed), ("requests/s, all longest", *long)]
table("Measured", ("", "standard", "swapping", "paged"), rows)

gain = mixed[2] / mixed[0] > long[2] / long[0]
judge(
    ("true", "memory is used poorly, moderately, highly",
     "Only a last block has empty slots", used, sorted(used)),
    ("true, if", "paging scales best of the three",
     "If memory is what lacks. Requests/s", max(mixed), mixed[2]),
    ("false", "long sequences gain most",
     "It is lengths that differ, and are not known before", gain, True),
    ("true", "complexity is low, medium, high",
     "Lines of the manager", lines, sorted(lines)),
)  # fmt: skip

# ## What is read

query, cache = np.ones((1, 4, 8), "f"), np.ones((8, 4, 2, 8), "f")
rows, length = cache.reshape(32, 2, 8), np.array([14])
blocks, start = np.array([[5, 2, 7, 0]]), np.array([3])
with recording(8) as kernels:
    naive_attention(query, rows, rows, start, length, backend="trace")
    paged_attention(query, cache, cache, blocks, length, backend="trace")
naive, pages = (kernel.counts("keys") for kernel in kernels)
judge(
    ("false", "it moves data in and out by need",
     "Who gave way was computed again. Bytes", runs[2].bytes_swapped, 0),
    ("false", "only the most relevant is read",
     "Lesson 15 does so. Keys of 14", (pages.sum((1, 2)) > 0).sum(), 14),
    ("true, if", "computing is more efficient",
     "Batches grow; reads stay", pages.sum(), naive.sum()),
)  # fmt: skip

# ## What it is good for

room = GPU.memory_bytes - models.MODELS["OPT-66B"].weight_bytes
calls = getsource(network).count("paged_attention")
steps = len(list((Path(__file__).parent / "refactor").glob("step[1-5]*")))
judge(
    ("false", "models larger than the GPU run",
     "Weights stay as large as they are", room < 0, True),
    ("false", "it manages data during training",
     "No cache to page (lesson 16). Calls of it", calls, 0),
    ("true", "your model can be moved to it",
     "Step by step, in lessons/refactor. Steps", steps, 5),
)  # fmt: skip

true.grade(words.count("true"))
false.grade(words.count("false"))

# ## What must hold
#
# A test of a claim must be able to fail. Which claim falls here?

break_it(
    "pages as large as the longest sequence: how many run at once",
    where=(setup.Setup, "make_manager"), caught_by="contract",
    bug=lambda real: lambda self: real(replace(self, block_size=2048)),
    run=lambda: [simulate.Simulation(WAYS[2], MIXED).run().running_peak],
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
# The paper's figures: 20.4% to 38.2% of the memory held tokens, 96.3% with
# vLLM (Kwon et al. 2023, Fig. 2). `paged-ref paper` shows ours beside them.

# ## Next
#
# Yours: `paged-ref assess` for your model, GPU and traffic.
