"""Lesson 1: why a KV cache

Question: what does a model compute again if it keeps nothing?
Time: 20 minutes. You need Python, matrix products, and no GPU.

A language model writes one token at a time. To choose the next one, it
looks back at all the tokens before. How much of that looking back is work
that it has done already? This lesson counts it.
"""

from dataclasses import replace

import numpy as np

from paged_ref import LLM, SamplingParams
from paged_ref.core.engine.engine import Engine
from paged_ref.kernels import naive_attention
from paged_ref.lesson import break_it, check, claim
from paged_ref.lesson import predict, table, todo

# ## Predict
#
# The prompt has seven tokens, and we let the model write some more. A
# **token pass** is one token taken once through all layers: this is what
# takes time. A model that keeps nothing has to take the whole text through
# its layers for each new token. A model that keeps what later tokens need
# takes each token through once. (The last new token is never taken through:
# no token comes after it.)

PROMPT = "Four score and seven years ago our"
NEW_TOKENS = 12

kept = predict(
    f"Token passes for {NEW_TOKENS} tokens, keeping all?", "passes"
)
again = predict("And keeping nothing?", "passes")

# ## Run
#
# The engine reports each step. With a cache, one request asks for all new
# tokens. Without a cache, each new token is a request of its own, and the
# text so far is the prompt.

passes = []
llm = LLM(
    manager="standard", backend="reference",
    on_step=lambda record: passes.append(sum(n for _, n in record.chunks)),
)  # fmt: skip


def generate(prompt, count):
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    (request,) = llm.generate(prompt, params)
    return request.prompt_token_ids, request.outputs[0].token_ids


prompt, tokens = generate(PROMPT, NEW_TOKENS)
with_cache, passes[:] = list(passes), []
text = list(prompt)
for _ in range(NEW_TOKENS):
    text += generate(text, 1)[1]
without = list(passes)

columns = ("", "first step", "second", "last", "all")
rows = [
    ("with the cache", *with_cache[:2], with_cache[-1], sum(with_cache))
]
rows += [("without", *without[:2], without[-1], sum(without))]
table("Token passes", columns, rows)
kept.grade(
    sum(with_cache),
    why=f"{len(prompt)} + {NEW_TOKENS} - 1: all but the last",
)
again.grade(
    sum(without), why=f"{without[0]} + {without[1]} + ... + {without[-1]}"
)

# The first step with the cache is the **prefill**: the whole prompt. The
# others are **decode** steps: one token each, however long the text. With
# no cache the work grows with the square of the length.

# ## What must hold
#
# What do later tokens need of an earlier one? In each layer attention takes
# the query of the new token, and a key and a value of every token so far.
# The query is used only once. Keys and values are used again. The key and
# the value of a token depend only on its position and on the tokens up to
# it; no later token changes them. So keys and values can be kept: this is
# the KV cache.

claim("the tokens are the same", text[len(prompt) :], tokens)
n, new = len(prompt), NEW_TOKENS
claim("passes with the cache", sum(with_cache), n + new - 1)
claim("passes without", sum(without), sum(n + i for i in range(new)))

# A key must be made with its token's position in the whole text. An engine
# that feeds one token at a time and counts its positions from zero again
# runs well, and writes other words.


def positions_from_zero(real):
    def prepare_inputs(self, plan):
        inputs = real(self, plan)
        fresh = np.arange(
            len(inputs.positions), dtype=inputs.positions.dtype
        )
        return replace(inputs, positions=fresh)

    return prepare_inputs


break_it(
    "each step counts its positions from zero",
    where=(Engine, "prepare_inputs"), bug=positions_from_zero,
    run=lambda: generate("Once upon a time", 48)[1], caught_by="contract",
    text=llm.tokenizer.decode,
)  # fmt: skip

# ## Exercise
#
# Write what the new token does with the kept keys and values. Score each
# key by its dot product with the query, over the square root of the head's
# size. Softmax makes weights of the scores: exp, then divide by the sum.
# The answer is the sum of the values by these weights.


def my_attention(q, keys, values):
    """q [head_size], keys and values [tokens, head_size] -> [head_size]"""
    return todo("3 lines")


def one_head(q, keys, values):
    start, count = np.array([0]), np.array([len(keys)])
    k, v = keys[:, None], values[:, None]
    query = q[None, None]  # one token, one head
    out = naive_attention(query, k, v, start, count, backend="reference")
    return out[0, 0]


draw = np.random.default_rng(0).standard_normal
cases = [(draw(8), draw((n, 8)), draw((n, 8))) for n in (1, 2, 9)]
hint = (
    "Scores are one number for each key; each line needs the one before.\n"
    "keys @ q gives all scores; weights @ values adds up the values."
)
check(my_attention, spec=one_head, cases=cases, hint=hint)

# ## In production systems
#
# All of these systems keep K and V, and split serving into the same two
# phases. The prefill keeps the GPU's arithmetic busy; a decode step mostly
# waits for memory, since it reads all weights and the whole cache for one
# token. So the systems decode many sequences together, and memory decides
# how many.

# ## Next
#
# See it move: `paged-ref viz --frame 6`, the steps of a run.
#
# Lesson 2: how much memory one token's keys and values take.
