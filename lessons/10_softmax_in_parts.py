"""Lesson 10: softmax in parts

Question: how can several workers share the keys of one softmax?
Time: 20 minutes. Needs lesson 9.

The kernel of lesson 9 goes through a sequence tile by tile, and one CUDA
block goes through all tiles. So a long sequence that runs alone leaves most
of a GPU idle. To share the work, each worker must take some of the keys.
But softmax divides every weight by a sum over all keys.
"""

from math import exp, log

import numpy as np

from paged_ref.kernels import merge_states, paged_attention
from paged_ref.interop import kernel_api
from paged_ref.lesson import break_it, check, claim
from paged_ref.lesson import predict, table, todo

# ## Predict
#
# The way out: a worker takes the softmax over its own keys only, and hands
# on its output with the **log-sum-exp** (lse) of its scores: the logarithm
# of the sum of their exponentials. The weight of the part is exp(lse), the
# sum itself. An output with its lse is an attention state.

HEAD_SIZE = 16
share = predict("Lse of A: 2, of B: 2 + ln 3. Share of B?", "percent")
handed_on = predict(f"A head is {HEAD_SIZE} wide. Numbers in its state?")

# ## Run
#
# One query token, the last of its sequence, so it sees every key. K and V
# lie in blocks. `attend` gives the state of some blocks. `in_parts` gives
# the states of all parts, each of `size` blocks.

LENGTH, BLOCK_SIZE, KV_HEADS, HEADS = 38, 4, 2, 4
rng = np.random.default_rng(0)
block_table = rng.permutation(12)[:10]
shape = (2, 12, BLOCK_SIZE, KV_HEADS, HEAD_SIZE)
keys, values = rng.standard_normal(shape, dtype=np.float32)
query = 2 * rng.standard_normal((1, HEADS, HEAD_SIZE), dtype=np.float32)


def attend(query, blocks, length):
    kv = keys, values, np.array([blocks]), np.array([length])
    return paged_attention(query, *kv, return_lse=True, backend="reference")


def in_parts(query, size):
    states = []
    for first in range(0, len(block_table), size):
        length = min(size * BLOCK_SIZE, LENGTH - first * BLOCK_SIZE)
        part = block_table[first : first + size]
        states.append(attend(query, part, length))
    return [np.stack(arrays) for arrays in zip(*states, strict=True)]


# Three workers, and one worker with all keys for comparison. The share of a
# part in the result follows from the lse: exp(its lse - the lse of all).

whole, whole_lse = attend(query, block_table, LENGTH)
outputs, lses = in_parts(query, 4)
shares = np.exp(lses - whole_lse)[:, 0]  # [parts, HEADS]
rows = []
for part, of_heads in enumerate(shares):
    blocks = " ".join(map(str, block_table[4 * part : 4 * part + 4]))
    rows.append((blocks, *of_heads.round(3).tolist()))
names = [f"head {head}" for head in range(HEADS)]
table("The share of each part in the result", ("blocks", *names), rows)
share.grade(
    100 * exp(log(3)) / (1 + exp(log(3))), within=0.01,
    why="exp(2 + ln 3) = 3 exp(2), so B has 3 of 4 parts",
)  # fmt: skip
handed_on.grade(
    (outputs[0].size + lses[0].size) // HEADS,
    why=f"an output of {HEAD_SIZE}, and its lse",
)

merged, _ = merge_states(outputs, lses)
claim("each head's shares sum to one", all(shares.sum(0).round(4) == 1))
merged, whole = merged.ravel(), whole.ravel()
claim("joined, the parts are attention over all keys", merged, whole)
again, _ = merge_states(outputs[::-1], lses[::-1])
claim("the order of the parts does not matter", again.ravel(), whole)

# States are written and read once. A state is small beside its K and V:

kv_size, state_size = 512 * KV_HEADS * HEAD_SIZE, HEADS * (HEAD_SIZE + 1)
claim("a state of 256 keys is under 1% of them", state_size < kv_size / 100)

# ## What must hold
#
# Scores may be large, and exp(100) is beyond float32. So the largest lse is
# subtracted from every lse before any exp. This changes no share.


def without_the_largest(real):
    def merge(outputs, lses):
        with np.errstate(all="ignore"):
            weights = np.exp(lses)[..., None]
            total = weights.sum(axis=0)
            return (outputs * weights).sum(axis=0) / total, np.log(total)

    return merge


break_it(
    "weights are exp(lse), with scores sixty times as large",
    where=(kernel_api, "merge_states"), bug=without_the_largest,
    run=lambda: kernel_api.merge_states(*in_parts(60 * query, 5))[0],
    caught_by="contract",
)  # fmt: skip

# ## Exercise
#
# Join two states of one head: outputs `a` and `b` (arrays), and their lse
# (floats). One of the two may have no key: then its lse is minus infinity.


def my_merge(a, lse_a, b, lse_b):
    """The state of both together: (output, lse)"""
    return todo("4 lines, with max, exp and log")


def spec(a, lse_a, b, lse_b):
    lses = np.array([lse_a, lse_b]).reshape(2, 1, 1)
    output, lse = merge_states(np.array([a, b])[:, None, None], lses)
    return output[0, 0], float(lse[0, 0])


a, b = rng.standard_normal((2, 3)).round(2)
pairs = [(1.0, 1.0), (2.0, 3.1), (5.0, -np.inf), (800.0, 801.0)]
hint = (
    "exp(800) overflows; exp(lse - the larger of both lse) is at most 1.\n"
    "Weights exp(lse - the larger lse), divided by their sum; the new lse "
    "is the larger one plus the log of that sum."
)
cases = [(a, one, b, other) for one, other in pairs]
mine = check(my_merge, spec=spec, cases=cases, hint=hint)

# Now one block after another: a kernel that goes through the blocks keeps
# one state, and joins each block to it. Your lines are the **online
# softmax** (Milakov et al. 2018).

outputs, lses = in_parts(query, 1)
state = np.zeros(HEAD_SIZE), -np.inf
for output, lse in zip(outputs[:, 0, 0], lses[:, 0, 0], strict=True):
    state = mine(*state, output, lse)
claim("block by block: the same", state[0], whole[:HEAD_SIZE])

# ## In production systems
#
# Flash-Decoding (Dao et al. 2023) splits the keys in this way; a small
# second kernel joins the states. Where many sequences share a prefix,
# FlashInfer and vLLM read the prefix once for all, and join its state to
# the state of each sequence's own keys. Here, the fast CPU backend splits
# long sequences over threads.

# ## Next
#
# See it move: `paged-ref walk --tokens 20 --at work`, tile by tile.
#
# Lesson 11: many sequences in one step, of which none waits for another.
