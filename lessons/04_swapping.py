"""Lesson 4: swapping

Question: can sequences stay in one piece if we move them when they grow?
Time: 15 minutes. Needs lesson 3.

Reserving wastes room because the future is not known. So do not reserve:
give each sequence a region of today's size, move the sequence to a larger
region when it grows, and to host memory when the device is full. What does
moving cost?
"""

from itertools import cycle

from paged_ref import LLM, SamplingParams
from paged_ref.lesson import break_it, check, claim
from paged_ref.lesson import predict, show, table, todo
from paged_ref.core.memory.regions import RegionPool
from paged_ref.core.memory.kv import KVCache
from paged_ref.extras.swapping import SwappingManager

# ## Predict
#
# Three sequences of six tokens lie side by side, in regions of 8 slots
# each. They take turns to grow by a token until each has ten; a region that
# is too small becomes one of 16. The pool has 64 slots, and that is plenty.

moved = predict("How many slots are copied until then?", "slots")

# ## Run
#
# First the bookkeeping alone. A letter is a slot with a token, a dot an
# empty slot of a region, and a blank a slot of no region.


def picture(manager):
    cells = [" "] * manager.num_slots
    for seq_id, region in manager.regions.items():
        text = "ABC"[seq_id] * region.length
        stop = region.start + region.size
        cells[region.start : stop] = text.ljust(region.size, ".")
    return "|" + "".join(cells) + "|"


manager = SwappingManager(64, alignment=8)
for seq_id in range(3):
    manager.admit(seq_id, range(6), max_len=10)
    manager.append([(seq_id, 6)])
show(picture(manager))
for seq_id in cycle(range(3)):
    if manager.length(seq_id) == 10:
        break
    for move in manager.append([(seq_id, 1)]):
        print(f"  {move.count} slots: {move.source} to {move.destination}")
        show(picture(manager))
moved.grade(
    manager.slots_moved,
    why="each outgrows its 8 slots once, when all 8 hold tokens: 3 x 8",
)

# With a neighbour in the way no region grows in place. Each move copies all
# tokens of a sequence, and leaves a hole. Now a real engine, with ample
# memory and with too little. The paged manager, the subject of lesson 5,
# stands beside it.

PROMPT = "Four score and seven years ago our"
OUTPUTS = [40, 30, 20, 35, 40, 25]


def serve(slots, **options):
    copied = {"move": 0, "swap_out": 0, "swap_in": 0}
    unit = options.get("block_size", 1)  # slots in one row of a transfer

    def count(record):
        for transfer in record.transfers:
            copied[transfer.kind] += transfer.count * unit

    options |= {"preemption": "swap", "backend": "reference"}
    llm = LLM(kv_cache_tokens=slots, on_step=count, **options)
    params = [SamplingParams(n, ignore_eos=True) for n in OUTPUTS]
    done = llm.generate([PROMPT] * len(OUTPUTS), params)
    return [request.outputs[0].token_ids for request in done], copied


rows, texts = [], []
for slots, memory in ((1024, "ample"), (128, "short")):
    for name, options in (("swapping", {}), ("paged", {"block_size": 4})):
        text, copied = serve(slots, manager=name, **options)
        rows.append((name, memory, *copied.values()))
        texts.append(text)
columns = ("manager", "memory", "moved", "swapped out", "swapped in")
table("Slots copied", columns, rows)

# ## What must hold
#
# A sequence may move at any time, if each slot is copied before it is read.

claim("the text is the same", all(text == texts[0] for text in texts))
claim("swapping moves with ample memory", rows[0][2] > 0)
claim("paging never moves a slot", rows[1][2] + rows[3][2], 0)
claim("all slots swapped out come back", rows[2][3], rows[2][4])

# So the order matters: first the copies, then the step. Here the copies
# back from the host are planned, and never made.


def never_comes_back(real):
    def apply(self, transfers):
        real(self, [t for t in transfers if t.kind != "swap_in"])

    return apply


break_it(
    "copies from host to device are left out",
    where=(KVCache, "apply"), bug=never_comes_back,
    run=lambda: serve(96, manager="swapping", sanitize=True)[0],
    caught_by="sanitizer",
)  # fmt: skip

# ## Exercise
#
# A sequence with `length` tokens has the region (start, size), which is too
# small: it must become `wanted` slots. It grows in place if the hole behind
# it is large enough. Else it moves to the first hole that is. Which copy
# does that cost: (source, destination, count), or None?


def my_move(holes, region, length, wanted):
    """holes and region are (start, size); holes are in order."""
    return todo("7 lines")


def spec(holes, region, length, wanted):
    pool = RegionPool(0)
    pool.holes = holes.copy()
    start, size = region
    if pool.grow(start, size, wanted - size):
        return None
    return start, pool.move(start, size, wanted), length


holes = [(3, 4), (16, 8), (40, 5), (50, 9), (70, 20)]
cases = [(holes, (8, 8), 8, 16), (holes, (8, 8), 7, 17)]
cases += [(holes, (30, 4), 3, 8), (holes, (36, 4), 4, 9)]
cases += [(holes, (36, 4), 4, 10), (holes, (60, 4), 2, 5)]
hint = (
    "Two questions, in order: does it fit here? If not, where?\n"
    "The hole behind it begins at start + size; it must have "
    "wanted - size slots."
)
check(my_move, spec=spec, cases=cases, hint=hint)

# ## In production systems
#
# No system of today moves a growing sequence. Swapping to the host has
# stayed, block by block: vLLM's first engine could swap a preempted request
# out, and today's systems use host memory as a second, larger cache.

# ## Next
#
# See it move: `paged-ref viz --manager swapping --at S`.
#
# Lesson 5: a sequence that no longer lies in one piece.
