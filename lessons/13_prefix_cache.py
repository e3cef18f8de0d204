"""Lesson 13: the prefix cache

Question: how does an engine find what it has computed before?
Time: 20 minutes. Needs lesson 12.

Each turn of a chat brings the whole past of the chat, and agents bring the
same long instructions. The K and V of such a beginning were computed
before, for another request. Here no sequence is forked: the requests come
one after another. So a full block must be found by its tokens.
"""

from paged_ref import LLM, SamplingParams
from paged_ref.lesson import break_it, check, claim, plug_in
from paged_ref.lesson import predict, table, todo
from paged_ref.extras import prefix_cache
from paged_ref.timeline.events import BlockCached, SequenceAdmitted
from paged_ref.extras.prefix_cache import block_digests

# ## Predict
#
# Only full blocks are found, and only from the beginning on: from the first
# block that differs, all tokens must be computed.

BLOCK_SIZE = 4
SYSTEM = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
chat = predict("Tokens found: ten seen before, three new?", "tokens")
twice = predict("And for twelve tokens, all seen before?", "tokens")

# ## Run
#
# One request after another, each with two new tokens. The events have the
# number of tokens that were found.

REQUESTS = {
    "ten tokens and two others": [*SYSTEM, 20, 21],
    "the same ten, three others": [*SYSTEM, 30, 31, 32],
    "the first request again": [*SYSTEM, 20, 21],
    "its tokens 4 to 11, alone": [*SYSTEM[4:], 20, 21],
}


def run(prompts, **options):
    events = []
    options |= {"block_size": BLOCK_SIZE, "max_batch_seqs": 1}
    options = {"kv_cache_tokens": 160, "prefix_cache": True} | options
    options |= {"backend": "reference", "sanitize": True}
    llm = LLM("tiny", log=events.append, **options)
    params = SamplingParams(2, ignore_eos=True)
    outputs = llm.generate(list(prompts), params)
    tokens = [t for out in outputs for t in out.outputs[0].token_ids]
    found = [e.length for e in events if isinstance(e, SequenceAdmitted)]
    return tokens, found, events, llm


# If all blocks of a prompt are found, its last block is computed again: the
# logits of the last token choose the next one.

tokens, found, events, llm = run(REQUESTS.values())
rows = []
for (name, prompt), hit in zip(REQUESTS.items(), found, strict=True):
    rows.append((name, len(prompt), hit, len(prompt) - hit))
table("Prompts", ("request", "tokens", "found", "computed"), rows)
chat.grade(found[1], why="10 // 4 = 2 full blocks, 2 x 4 tokens")
twice.grade(
    found[2],
    why="all 3 blocks are known, but the last token must be computed",
)
without, nothing, _, _ = run(REQUESTS.values(), prefix_cache=False)
claim("no token changes", tokens, without)
claim("tokens found without the cache", sum(nothing), 0)
claim("found without their beginning", found[3], 0)

# ## How a block is found
#
# By a digest of its tokens and of the digest of the block before. So one
# key stands for a block and all blocks before it, and no prompts are
# compared. The last two prompts end with the same eight tokens, and share
# no key:

rows = []
for prompt in ([*SYSTEM, 20, 21], [*SYSTEM[4:], 20, 21]):
    keys = [key.hex()[:6] for key in block_digests(prompt, BLOCK_SIZE)]
    rows.append((" ".join(map(str, prompt)), "  ".join(keys)))
table("The keys of full blocks", ("prompt", "keys"), rows)

# When a sequence ends, its full blocks stay cached, although no table names
# them. When the room is needed, the block that was used longest ago is
# evicted first.

cached = sum(isinstance(event, BlockCached) for event in events)
pool = llm.engine.manager.manager.pool  # inside the one that logs
claim("blocks cached, and in no table", pool.num_cached, cached)
again = [[*SYSTEM, 20, 21], list(range(40, 52)), [*SYSTEM, 20, 21]]
claim("found again, after another prompt", run(again)[1][2], 8)
small = run(again, kv_cache_tokens=16)[1][2]
claim("the same in a pool of four blocks", small, 0)

# ## What must hold
#
# K and V depend on all tokens before them. A key made of a block's own
# tokens would find the right tokens with the wrong past. The text would
# still be fluent, and wrong: such a bug is not seen for months.

PROMPTS = [[5] * 4 + [6] * 5, [7] * 4 + [8] * 5, [5] * 4 + [8] * 5]


def without_parent(real):
    def digests(tokens, size, parent=b""):
        for start in range(0, len(tokens) - size + 1, size):
            yield from real(tokens[start : start + size], size)

    return digests


break_it(
    "a block's key is made of its own tokens only",
    where=(prefix_cache, "block_digests"), bug=without_parent,
    run=lambda: run(PROMPTS)[0], caught_by="sanitizer",
)  # fmt: skip

# ## Exercise
#
# Give the keys of the full blocks of `tokens`. The block before them has
# the key `parent`. `link(parent, tokens)` makes one key.


def link(parent, tokens):
    return next(block_digests(tokens, len(tokens), parent))


def my_keys(tokens, size, parent=b""):
    return todo("5 lines, in a list")


def spec(tokens, size, parent=b""):
    return list(block_digests(tokens, size, parent))


prompt = [*SYSTEM, *SYSTEM]
cases = [(prompt, 4), (prompt[:7], 4, b"x"), ([1, 2], 4), (prompt[:8], 2)]
hint = (
    "Equal tokens behind different beginnings need different keys.\n"
    "Each key is the parent of the next. Only full blocks have a key."
)
mine = check(my_keys, spec=spec, cases=cases, hint=hint)

with plug_in((prefix_cache, "block_digests"), mine):
    claim("found with yours in place", run(REQUESTS.values())[1], found)

# ## In production systems
#
# vLLM finds blocks of 16 tokens by chained hashes as here; SGLang keeps a
# tree of prefixes (Zheng et al. 2024), which also finds beginnings that end
# inside a block. Both evict what was used longest ago. Mooncake (Qin et al.
# 2025) keeps blocks of 512 tokens beyond the GPU, for many engines.

# ## Next
#
# See it move: `paged-ref viz --at H --frame 4`.
#
# Lesson 14: a full pool, in which all sequences must grow.
