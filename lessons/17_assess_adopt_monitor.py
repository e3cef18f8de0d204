"""Lesson 17: assess, adopt, monitor

Question: would paging help you, and how would you see that it does?
Time: 20 minutes. Needs lesson 16.

You have a model, a GPU and traffic. The answer begins on paper: how many
sequences fit, and for what does the GPU then spend its time? If memory is
not the bottleneck, no way to manage memory helps much. Code comes later.
"""

import math  # noqa: F401  (for your answer)
from dataclasses import replace
from difflib import ndiff
from itertools import pairwise
from pathlib import Path

from paged_ref import llm
from paged_ref.lesson import break_it, check, claim
from paged_ref.lesson import predict, show, table, todo
from paged_ref.core.memory.block_pool import BlockPool, OutOfBlocks
from paged_ref.core.memory.paged import PagedManager
from paged_ref.planner.assess import assess
from paged_ref.planner.engine_run import engine_steps, simulated_steps
from paged_ref.planner.hardware import GPUS
from paged_ref.planner.models import MODELS, model_named
from paged_ref.planner.settings import servers
from paged_ref.planner.setup import Setup
from paged_ref.planner.traces import at_rate, generated

# ## Predict
#
# One GPU, traffic with the mean lengths of the paper's ShareGPT, and two
# models. OPT has a KV head for each query head; in Llama 3 four query heads
# share one. `max` reserves the longest that a sequence may become. `exact`
# knows the length beforehand, which no real system can.

gpu = GPUS["A100-40GB"]
models = MODELS["OPT-13B"], MODELS["Llama-3-8B"]
gain = predict("Requests a second, OPT, paged against max?", "times")
other = predict("And for Llama 3, against exact?", "times")

# ## Run
#
# **Assess.** Here the real scheduler and managers run, with requests that
# always wait; the time of a step is computed from shapes and a datasheet.
# The commands `paged-ref assess` and `paged-ref compare` print the same
# numbers with every constant.

traffic = generated("sharegpt")
rows, found = [], {}
for model in models:
    a = assess(Setup("", gpu, model, max_model_len=2048), traffic)
    found[model.name] = a
    for plan in a.plans:
        used = f"{plan.steady.outcome.shares.occupancy:.0%}"
        running = round(plan.steady.outcome.running_mean, 1)
        row = (model.name, plan.name, running, used, plan.rate)
        rows.append(row)
columns = ("model", "memory", "sequences", "used", "requests/s")
table("A request always waits", columns, rows)
for name, a in found.items():
    waits = f"the next request waits for {a.paged.admission}"
    show(f"  {name}: {waits}, a step for {a.paged.step.bound}\n")
gain.grade(
    found["OPT-13B"].gain["standard max"], within=0.15,
    why="four times as many run; each step reads more K and V, too",
)  # fmt: skip
other.grade(
    found["Llama-3-8B"].gain["standard exact"], within=0.15,
    why="twice as many run, and a step waits for arithmetic by then",
)  # fmt: skip

# Where a request waits for memory, and a step for bandwidth, because the
# weights are read for few sequences, more sequences would cost little more
# time. There paging pays. Where most of what is read is K and V, or
# arithmetic takes the time, more sequences help less. With Llama 3, 256
# sequences run, and no more may: the next request waits until one ends.
#
# **Select.** The same decision as options of a server that pages:

# (`--kv-offloading-size` is GiB of host memory for blocks that leave.)

vllm = servers(found["OPT-13B"])[0]
table(vllm.name, ("option", "value"), vllm.options)

# **Adopt.** `lessons/start_here/` moves a model to pages in five steps.
# Each step runs, and keeps all tokens.

folder = Path(__file__).parent / "start_here"
files = sorted(folder.glob("step[0-5]*"))
texts = [file.read_text(encoding="utf-8").splitlines() for file in files]
diffs = [ndiff(*two) for two in pairwise(texts)]
changed = [sum(line[0] in "+-" for line in diff) for diff in diffs]
claim(f"lines changed, step by step: {changed}", max(changed) < 80)

# ## What must hold
#
# **Test.** `paged-ref compare` runs the real scheduler and manager over
# requests, without a model. An engine with a model must decide the same in
# every step, or the forecast is worthless.

setup = Setup("small", gpu, model_named("tiny"), kv_tokens=192)
setup = replace(setup, max_model_len=96, block_size=4, max_batch_tokens=64)
small = at_rate(generated("alpaca", 12, longest=96), 4000)


def forecast_and_run():
    steps, arrived = simulated_steps(setup, small)
    return steps, engine_steps(setup, small, arrived, backend="reference")


forecast, ran = forecast_and_run()
claim("steps whose decisions and memory are as forecast", ran == forecast)

# **Monitor.** Watch these numbers. A few preemptions are the price of
# admitting many sequences. Preemptions in most steps mean that much work is
# done twice: admit fewer sequences, or give the cache more memory.

rows = []
for number, step in list(enumerate(ran))[:: len(ran) // 8]:
    used = f"{step.usage.tokens / step.usage.total:.0%}"
    counts = step.num_running, step.num_waiting, step.num_preempted
    rows.append((number, *counts, used))
columns = ("step", "running", "waiting", "gave way", "tokens in memory")
table("An engine at work", columns, rows)
show(f"  gave way in all steps: {sum(s.num_preempted for s in ran)}\n")

# An engine with another setting gives the same tokens. What shows the
# difference?

break_it(
    "admission leaves a third of the blocks free",
    where=(llm, "make_manager"),
    bug=lambda real: lambda *a, **b: real(*a, **b | {"watermark": 0.34}),
    run=lambda: [a == b for a, b in zip(*forecast_and_run(), strict=False)],
    caught_by="contract",
    text=lambda same: f"{sum(same)} of {len(same)} steps are as forecast",
)  # fmt: skip

# ## Exercise
#
# How many sequences fit if each grows to `length` tokens? Memory is in
# bytes, `kv` is bytes of K and V for a token, a block has `size` slots.


def my_fit(memory, weights, kv, length, size):
    return todo("2 lines")


def spec(memory, weights, kv, length, size):
    pool = BlockPool((memory - weights) // (kv * size))
    manager = PagedManager(pool, size)
    try:
        for seq in range(10**6):
            manager.admit(seq, range(length), length)
            manager.append([(seq, length)])
    except OutOfBlocks:
        return seq


cases = [(1000, 200, 10, 7, 4), (1000, 200, 10, 8, 4), (999, 0, 7, 30, 16)]
hint = (
    "A block belongs to one sequence, so its rest is of no use.\n"
    "Whole blocks first: how many there are, how many a sequence takes."
)
check(my_fit, spec=spec, cases=cases, hint=hint)

# ## In production systems
#
# vLLM and SGLang export such numbers to Prometheus: running, waiting, cache
# usage, preemptions. `paged-ref monitor --once` gives them as JSON.

# ## Next
#
# See it move: `paged-ref monitor --run demo`.
#
# Lesson 18: what people say about PagedAttention, and what is true.
