"""Lesson 16: training in pages

Question: can pages hold what training has to remember?
Time: 20 minutes. Needs lesson 15.

PagedAttention serves models; it does not train them. Training knows its
text beforehand and has no KV cache. Yet training fills memory, too: the
backward pass needs again what each layer computed in the forward pass. The
pages of lesson 15 can hold these activations. Is that worth the trouble?
"""

import numpy as np

from paged_ref.core.model.config import ModelConfig
from paged_ref.core.device import to_host
from paged_ref.lesson import break_it, check, claim
from paged_ref.lesson import predict, show, table, todo
from paged_ref.beyond_device.residency import Residency
from paged_ref.training.activations import MEMORY, activations_for
from paged_ref.tuned.copies import CopyStream
from paged_ref.training.network import PackedBatch, loss_and_gradient
from paged_ref.training.network import saved_shapes
from paged_ref.training.parameters import Parameters

# ## Predict
#
# A small Llama of six layers learns from a batch of three texts. The budget
# holds what two and a half layers save. There are four ways: keep all, over
# the budget; swap whole layers to the host; move pages to the host and
# back; or save only the input of each layer, and recompute the rest.

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=80, num_layers=6,
    num_heads=4, num_kv_heads=2, head_size=8, max_position_embeddings=128,
    tie_word_embeddings=True,
)  # fmt: skip
LENGTHS, PAGE = (96, 40, 64), 4096
sizes = saved_shapes(CONFIG, sum(LENGTHS))
layer = 4 * sum(int(np.prod(shape)) for shape in sizes.values())  # bytes
BUDGET = 5 * layer // 2
each, inputs = layer // 4 // sum(LENGTHS), CONFIG.hidden_size
show(f"  A layer saves {each} numbers for a token; {inputs} are its input.")
swapped = predict("How many of six layers does `swap` move out?", "layers")
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
    saved = activations_for(memory, CONFIG, sum(LENGTHS), budget, PAGE)
    gradient = Parameters(CONFIG)
    loss_and_gradient(weights, gradient, PackedBatch.of(texts), saved)
    layers = gradient.flat[gradient.embedding.size :]
    return to_host(layers), saved.counts


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
swapped.grade(
    swap.moved_out // layer, why="two whole layers fit in the budget: 6 - 2"
)
times.grade(
    keep.peak / recompute.peak, within=0.15,
    why=f"`recompute` holds only the input of a layer: {each} / {inputs}",
)  # fmt: skip

# All four give the layers the same gradient to the bit: a move changes no
# byte, and a second computation gives the same numbers as the first.

claim("the four gradients are equal", all(row[-1] for row in rows))
claim("`keep` holds what six layers save", keep.peak, 6 * layer)
claim(
    "`swap` and `page` stay in the budget",
    max(swap.peak, page.peak) <= BUDGET,
)

# The backward pass needs the layers from the last to the first, and this
# order is known beforehand. So the first layers are moved out, since they
# are needed last, and only what does not fit is moved (Belady's rule).
# `swap` cannot use the half layer of room. Pages can, and this is all that
# they gain:

missing = -(-layer // PAGE) * 6 - BUDGET // PAGE
left = page.moved_out // PAGE
claim("pages moved out: those without room", left, missing)
claim("pages move fewer bytes", page.moved_out < swap.moved_out)

# So the claim that PagedAttention manages memory "during training" is true
# of pages, not of PagedAttention. And pages win little: all sizes are known
# before a step begins, so no reservation is saved; no page is shared; and
# recomputing costs about a third more arithmetic, without any copy.

# ## What must hold
#
# A page must come back with the bytes that it had. Here a page gets its
# place, and its bytes stay on the host. Training would go on with a wrong
# gradient, and learn worse.

break_it(
    "pages come back without their bytes",
    where=(CopyStream, "back_planes"),
    bug=lambda real: lambda self, host, device: None,
    run=lambda: learn("page")[0], caught_by="contract",
)  # fmt: skip

# ## Exercise
#
# Eviction. Pages 0, 1, 2 and so on are saved one after another, and
# `layers[i]` is the layer of page i. The device holds `budget` pages. If it
# is full when a page is saved, a page that is there moves out: one of the
# lowest layer, and of these the one that was saved first. Which pages move
# out, in this order?


def my_moved_out(layers, budget):
    return todo("6 lines, in a list")


def spec(layers, budget):
    memory = Residency(budget, len(layers), priority=layers.__getitem__)
    moved_out = []
    for _ in layers:
        before = list(memory.eviction_order())
        memory.add()
        now = set(memory.eviction_order())
        moved_out += [page for page in before if page not in now]
    return moved_out


cases = [([0, 0, 1, 2], 2), ([3, 1, 2, 1, 0, 4], 3), ([5, 5, 4, 4], 4)]
cases += [([0, 0, 0, 1, 1, 1, 2, 2, 2], 4), ([2, 1, 0], 1)]
hint = (
    "Keep the pages that are there in a list, in the order of saving.\n"
    "min(held, key=...) gives the first of equals."
)
check(my_moved_out, spec=spec, cases=cases, hint=hint)

# ## In production systems
#
# Recomputing (Chen et al. 2016) is an option of every trainer. vDNN (Rhu et
# al. 2016) moved whole layers to the host, as `swap` does. PyTorch can let
# a memory pool grow by pages that the driver maps: no kernel reads a table.
# `paged-ref train --memory page` trains a model as above.

# ## Next
#
# See it at work, with any text as FILE: `paged-ref train --text FILE --out
# DIR --steps 20 --memory page --budget 24MiB`.
#
# Lesson 17: what would you gain by paging, and how would you see it?
