"""Lesson 5: the block table

Question: where does a token lie when its sequence is cut into pages?
Time: 15 minutes. Needs lesson 4.

Every scheme so far kept a sequence in one piece, and paid with reserved
slots or with moves. Operating systems had the same trouble with programs,
and gave up the one piece: memory is cut into pages of one size, a program
takes any free pages, and a table lists which.
"""

from paged_ref import LLM, SamplingParams
from paged_ref.extras.token_text import token_text
from paged_ref.kernels import slot_of
from paged_ref.lesson import break_it, check, claim, plug_in
from paged_ref.lesson import predict, table, todo
from paged_ref.core.memory import paged

# ## Predict
#
# A page is a **block** in the code: room for the K and V of `block_size`
# tokens. A **slot** is the room of one token. Slots are numbered from the
# first block to the last, so the slots of block 2 follow those of block 1.
# The **block table** of a sequence lists its blocks in order, wherever they
# are: an entry is the physical number of a block, and the place of the
# entry in the list is the block's logical number.
#
# The example is the paper's (Kwon et al. 2023, Fig. 6). Blocks have four
# slots, and the free ones are handed out in the order below. Each word of
# the prompt is one token, and positions count from zero.

PROMPT = "Four score and seven years ago our"
BLOCK_SIZE = 4
FREE_ORDER = [7, 1, 3, 0, 2, 4, 5, 6, 8]
POSITION = 8  # the ninth token

blocks = predict("How many blocks hold the first 9 tokens?", "blocks")
slot = predict(f"In which slot lies the token at position {POSITION}?")

# ## Run
#
# A real engine with a real, tiny model. `sanitize=True` checks every read
# of the cache: we need this below.

OPTIONS = {"backend": "reference", "sanitize": True}
OPTIONS |= {"block_size": BLOCK_SIZE, "kv_cache_tokens": 36}
llm = LLM(free_order=FREE_ORDER, **OPTIONS)
id_ = llm.add_request(PROMPT, SamplingParams(max_tokens=12))
request = llm.output_of(id_)
while len(request.outputs[0].token_ids) < 3:
    llm.step()

# After three steps two new tokens are in the cache. (The third token is
# known, but its K and V are computed in the next step.) The table now:

tokens = request.prompt_token_ids + request.outputs[0].token_ids[:2]
words = [token_text(llm.tokenizer, token) for token in tokens]
block_table = list(llm.engine.manager.placement(0))
rows = []
for logical, physical in enumerate(block_table):
    start, first = logical * BLOCK_SIZE, physical * BLOCK_SIZE
    slots = f"{first} to {first + BLOCK_SIZE - 1}"
    here = " ".join(words[start : start + BLOCK_SIZE])
    rows.append((logical, physical, slots, here))
table("Sequence 0", ("logical", "physical", "slots", "tokens"), rows)
blocks.grade(len(block_table), why="9 = 4 + 4 + 1: two full, one begun")
slot.grade(
    slot_of(block_table, POSITION, BLOCK_SIZE),
    why="8 // 4 = 2, table[2] = 3, 3 x 4 + 8 % 4 = 12 + 0 = 12",
)

# ## What must hold
#
# A sequence has just enough blocks: only its last one may have empty slots.
# So paging wastes less than one block for each sequence, whatever its
# length. And no slot belongs to two positions.

places = [slot_of(block_table, p, BLOCK_SIZE) for p in range(len(tokens))]
empty = len(block_table) * BLOCK_SIZE - len(tokens)
given = FREE_ORDER[: len(block_table)]
claim("the table has the blocks that were handed out", block_table, given)
claim(f"{empty} slots are empty, less than a block", empty < BLOCK_SIZE)
claim("each position has its own slot", len(set(places)), len(tokens))

# And the place of a block must change no token. Here is the same request
# with the blocks handed out in another order.


def generate(order):
    llm = LLM(free_order=order, **OPTIONS)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    return llm.generate(PROMPT, params)[0].outputs[0].token_ids


usual, other = generate(FREE_ORDER), generate(FREE_ORDER[::-1])
claim("the order of the blocks changes no token", other, usual)

# What breaks if this does not hold? Here a sequence takes the slot after
# the last one of its block, without looking into the table. That is right
# as long as its blocks lie side by side, so a test on a fresh pool passes.


def one_slot_on(real):
    def slots(self, seq_id, first, count):
        found = real(self, seq_id, first, count)
        if first and first % self.block_size == 0:
            found[0] = real(self, seq_id, first - 1, 1)[0] + 1
        return found

    return slots


where = (paged.PagedManager, "slots")
break_it(
    "the first token of a new block is written behind the block before",
    where=where, bug=one_slot_on, run=lambda: generate(FREE_ORDER),
    caught_by="sanitizer",
)  # fmt: skip

# ## Exercise
#
# The whole idea in two lines. The block table maps a logical block to a
# physical one; the position inside the block stays the same.


def my_slot_of(block_table, position, block_size):
    """The slot that holds `position`."""
    return todo("2 lines")


cases = [(FREE_ORDER, p, size) for size in (4, 3, 1) for p in range(9)]
hint = (
    "Two questions: which logical block is it, and where in the block?\n"
    "Integer division gives the block, the remainder the place in it."
)
mine = check(my_slot_of, spec=slot_of, cases=cases, hint=hint)

# The paged manager calls this function to learn where to write. With yours
# in its place the model must give the same tokens:

with plug_in((paged, "slot_of"), mine):
    claim("the engine gives the same", generate(FREE_ORDER), usual)

# ## In production systems
#
# vLLM keeps the tables of all running sequences as rows of one int32 array
# on the GPU, and one table serves every layer: each layer has a cache of
# its own, in blocks of the same size. FlashInfer takes the rows joined end
# to end, with an array of the place where each row begins. vLLM's blocks
# have 16 slots by default (Kwon et al. 2023, §7.2): small enough to waste
# little, large enough to be read in long runs.

# ## Next
#
# See it move: `paged-ref viz`: the tables of this example, step by step.
#
# Lesson 6: the pool that hands out the blocks and knows which are free.
