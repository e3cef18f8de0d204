"""Lesson 20: one table, several workers

Question: what must each of several workers be told of where tokens lie?
Time: 20 minutes. Needs lesson 12.

A model that is too large for one GPU is cut into parts, and each part is
computed by a worker of its own. Each worker then has a KV cache, too. Does
each need a scheduler, a block pool and block tables of its own? The paper
answers in one paragraph (Kwon et al. 2023, §4.6). This lesson runs it.
"""

import numpy as np

from paged_ref import LLM, SamplingParams
from paged_ref.core.device import to_host
from paged_ref.distributed import plan
from paged_ref.distributed.split import heads_of_ranks, part_of
from paged_ref.lesson import break_it, check, claim
from paged_ref.lesson import predict, show, table, todo
from paged_ref.lesson.rank_threads import threads

# ## Predict
#
# The embedded model on two workers, which are called ranks. A layer is cut
# by heads: each rank has the weights of its heads, and their K and V.
# Rank 0 has the requests, the scheduler and the tables. Before a step, rank
# 0 sends its **plan**: five counts; for each token its id, position and
# slot; for each sequence its block table and four numbers more; and which
# blocks to copy. All are integers of 4 bytes.
#
# In each layer each rank has a part of two sums: that of the heads, and
# that of the feed-forward part. Both sums have `hidden_size` numbers for
# each token, of 4 bytes here, and are added over the ranks.

RANKS, BLOCK_SIZE = 2, 4
PROMPT = list(range(20, 30))
config = LLM("tiny", backend="reference").config
show(f"  {config.num_layers} layers, hidden_size {config.hidden_size},")
show(f"  {config.num_heads} heads, {config.num_kv_heads} KV heads\n")
sent = predict("How long is the plan of one new token?", "bytes")
summed = predict("How much is summed for that token?", "bytes")

# ## Run
#
# The ranks are threads of this process, so that the lesson needs nothing
# more. `paged-ref generate --tensor-parallel 2` runs the same code in
# processes that MPI connects.


def make(group=None, log=None):
    options = {"block_size": BLOCK_SIZE, "kv_cache_tokens": 160}
    return LLM("tiny", backend="reference", group=group, **options)


def tokens(llm, n=1):
    options = {"n": n, "temperature": 1.0, "ignore_eos": True}
    params = SamplingParams(12, seed=7, **options)
    (output,) = llm.generate([PROMPT], params)
    return [sample.token_ids for sample in output.outputs]


def on_ranks(n=1):
    with threads(RANKS, make) as llms:
        return tokens(llms[0], n)


claim("one rank or two: the same tokens", on_ranks(), tokens(make()))
claim(
    "and so with samples that share blocks", on_ranks(3), tokens(make(), 3)
)

# Now a step by itself. Each rank counts the bytes of its messages.

params = SamplingParams(8, ignore_eos=True)
groups = []
with threads(
    RANKS, lambda group: groups.append(group) or make(group)
) as llms:
    llms[0].add_request(PROMPT, params)
    llms[0].step()
    before = groups[0].bytes.copy()
    llms[0].step()
    said = groups[0].bytes - before
    tables = [llm.engine.manager.tables for llm in llms]
    blocks = tables[0][0].blocks.copy()
    llms[0].step()
rows = [(name, f"{number:,}") for name, number in said.items()]
table("One token: what is said", ("", "bytes"), rows)
sent.grade(
    said["broadcast"], within=0.1,
    why="5 counts, 3 for the token, 4 for its sequence, 3 blocks: 15 * 4",
)  # fmt: skip
summed.grade(
    said["reduced"], within=0.1,
    why="5 layers * 2 sums * 128 numbers * 4 bytes",
)  # fmt: skip

# The formula of the plan, and the two sums of each layer:

expected = plan.plan_bytes(1, 1, 1, len(blocks), 0)
claim("the plan, from its formula", said["broadcast"], expected)
numbers = 2 * config.num_layers * config.hidden_size
claim("two sums in a layer", said["reduced"], 4 * numbers)
claim("logits of a row, gathered", said["gathered"], 4 * config.vocab_size)
show(f"  K and V that are sent: none. Tables of rank 1: {tables[1]}\n")
claim("rank 1 has no table", tables[1] == {} and len(tables[0]) == 1)

# ## Why one table is enough
#
# A slot is `block * block_size + offset`. No head is in that formula. Every
# rank computes the same tokens in the same step, so token by token they
# fill the same slots, each with K and V of its own heads. And no rank looks
# into the pool of another: a head attends to itself alone.

heads, kv_heads = heads_of_ranks(config, RANKS)
rows = [
    (rank, *map(str, (heads[rank], kv_heads[rank])), kv.device[0].shape)
    for rank, kv in enumerate(llm.engine.kv for llm in llms)
]
columns = ("rank", "heads", "KV heads", "K and V of a layer")
table("Heads: from, up to", columns, rows)

alone = make()
alone.add_request(PROMPT, params)
for _ in range(3):
    alone.step()
pools = [to_host(llm.engine.kv.device)[:, :, blocks] for llm in llms]
together = np.concatenate(pools, axis=4)
whole = to_host(alone.engine.kv.device)[:, :, blocks]
difference = np.nanmax(abs(together - whole))
claim("the ranks' pools, side by side, are one", difference < 1e-4)

# ## What must hold
#
# Each rank makes the copies of the plan, or the heads of that rank read a
# block that was never filled. Here rank 1 drops them:

break_it(
    "rank 1 makes no copy on write",
    where=(plan, "unpack"), caught_by="engine",
    bug=lambda real: lambda buffer: ([], real(buffer)[1]),
    run=lambda: on_ranks(3),
)  # fmt: skip

# ## Exercise
#
# The product after attention reads the heads: `x [rows, in]` times
# `weight [out, in]`. A rank has only its columns of `x`, so the product is
# cut by inputs. Give the parts of `size` ranks, in a list: their sum is the
# product. Rank 0 has the first inputs, and all ranks have equally many.


def my_parts(x, weight, size):
    return todo("2 lines")


def spec(x, weight, size):
    parts = [part_of(x.shape[1], rank, size) for rank in range(size)]
    return [x[:, part] @ weight[:, part].T for part in parts]


x, weight = np.arange(8).reshape(2, 4), np.arange(12).reshape(3, 4)
cases = [(x, weight, 2), (x, weight, 4), (x[:1], weight, 1)]
check(my_parts, spec=spec, cases=cases, hint="The same columns of both.")

# ## In production systems
#
# vLLM's workers get the scheduler's output in each step, and their pools
# have the same block numbers. Sums go from GPU to GPU by NCCL, two in each
# layer as here (Shoeybi et al. 2019). With fewer KV heads than ranks, some
# ranks hold the same KV head: then a token takes more memory in all.

# ## Next
#
# See it move: `paged-ref generate --prompt "The cat" --tensor-parallel 2
# --record run.jsonl`, then `paged-ref viz run.jsonl`.
#
# Lesson 21: your own paged cache.
