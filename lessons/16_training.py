"""Lesson 16: training in pages

Question: can pages hold what training has to remember?
Time: 20 minutes. Needs lesson 15.

PagedAttention serves models; it does not train them. Training knows its
text beforehand and has no KV cache. Yet it fills memory, too: what each
layer computes on the way forwards is needed once more on the way back. The
same residency of pages as in lesson 15 can hold that. Is it worth it?
"""

import numpy as np

from paged_ref.core.model.config import ModelConfig
from paged_ref.core.device import to_host
from paged_ref.lesson import break_it, check, claim
from paged_ref.lesson import predict, table, todo
from paged_ref.beyond_device.residency import ByPriority
from paged_ref.training.activations import MEMORY, activations_for
from paged_ref.tuned.copies import CopyStream
from paged_ref.training.network import PackedBatch, loss_and_gradient
from paged_ref.training.network import saved_shapes
from paged_ref.training.parameters import Parameters

# ## Predict
#
# A small Llama of six layers learns from three texts at once. There is room
# for two and a half layers' worth of what they save. Four ways to live with
# that: keep it all the same, swap whole layers to the host, let pages
# leave and come back, or save each layer's input alone, and recompute.

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=80, num_layers=6,
    num_heads=4, num_kv_heads=2, head_size=8, max_position_embeddings=128,
    tie_word_embeddings=True,
)  # fmt: skip
LENGTHS, PAGE = (96, 40, 64), 4096
sizes = saved_shapes(CONFIG, sum(LENGTHS))
layer = 4 * sum(int(np.prod(shape)) for shape in sizes.values())  # bytes
BUDGET = 5 * layer // 2
swapped = predict("How many of six layers does `swap` send away?", "layers")
times = predict("Peak of `keep` over peak of `recompute`?", "times")

# ## Run
#
# One batch forwards and backwards, four times, with the same weights.

rng = np.random.default_rng(0)
texts = [rng.integers(64, size=length + 1) for length in LENGTHS]
weights = Parameters(CONFIG)
weights.initialize(seed=0)


def learn(memory, budget=BUDGET):
    """The layers' gradient, and what was held and moved."""
    budget = budget if memory in ("swap", "page") else None
    its = activations_for(memory, CONFIG, sum(LENGTHS), budget, PAGE)
    gradient = Parameters(CONFIG)
    loss_and_gradient(weights, gradient, PackedBatch.of(texts), its)
    layers = gradient.flat[gradient.embedding.size :]
    return to_host(layers), its.counts


runs = {memory: learn(memory) for memory in MEMORY}
right, keep = runs["keep"]
rows = []
for memory, (gradient, counts) in runs.items():
    same = np.array_equal(gradient, right)
    out, back = counts.moved_out // 1024, counts.moved_in // 1024
    rows.append((memory, counts.peak // 1024, out, back, same))
columns = ("memory", "peak KiB", "KiB out", "KiB back", "same gradient")
table(f"A budget of {BUDGET // 1024} KiB", columns, rows)
swap, page, recompute = (runs[name][1] for name in MEMORY[1:])
swapped.grade(swap.moved_out // layer)
times.grade(keep.peak / recompute.peak, within=0.15)

# All four give the layers the same gradient to the bit: moving bytes
# changes none, and what is computed again comes out as before.

claim("four gradients are one", all(row[-1] for row in rows))
claim("`keep` holds what six layers save", keep.peak, 6 * layer)
claim(
    "`swap` and `page` stay in the budget",
    max(swap.peak, page.peak) <= BUDGET,
)

# Backward asks for layers from the last to the first, and everyone knows
# that beforehand. So the lowest layers leave, which are needed last, and
# nothing moves but what does not fit (Belady's rule). `swap` cannot
# use the half layer of room; pages can. That is all they win here:

missing = -(-layer // PAGE) * 6 - BUDGET // PAGE
left = page.moved_out // PAGE
claim("pages that left are those without room", left, missing)
claim("pages move fewer bytes", page.moved_out < swap.moved_out)

# And so the claim that PagedAttention manages memory "during training" is
# true of pages, not of PagedAttention, and no great matter: sizes are known
# before a step begins, so there is no reservation to save, nothing is
# shared, and to recompute costs about a third more arithmetic and no bus.

# ## What must hold
#
# What comes back is what left. Here a page is mapped, and its bytes stay on
# the host. Training would go on, with a wrong gradient, and learn worse.

break_it(
    "pages come back without their bytes",
    where=(CopyStream, "back"),
    bug=lambda real: lambda self, host, device: None,
    run=lambda: learn("page")[0], caught_by="contract",
)  # fmt: skip

# ## Exercise
#
# The policy. `layers[i]` is the layer of page i, and pages came in this
# order. Which `count` pages leave, the first to leave first? Of the same
# layer, the one that came first.


def my_leaving(layers, count):
    return todo("2 lines, with sorted")


def spec(layers, count):
    policy = ByPriority(layers.__getitem__)
    policy.used(range(len(layers)))
    return list(policy.order())[:count]


cases = [([0, 0, 1, 2], 3), ([3, 1, 2, 1, 0], 4), ([5, 5, 4, 4], 1)]
hint = (
    "Sort the page numbers by their layer; sorted() keeps equals in order."
)
check(my_leaving, spec=spec, cases=cases, hint=hint)

# ## In production systems
#
# Recomputing (Chen et al. 2016) is an option of every trainer. vDNN (Rhu et
# al. 2016) moved whole layers to the host, as `swap` does. PyTorch can map
# pages under a growing pool: paging by the driver, with no table in any
# kernel. `paged-ref train --memory page` trains a model as above.

# ## Next
#
# Lesson 17: what would paging buy you, and how would you see it?
