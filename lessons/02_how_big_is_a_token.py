"""Lesson 2: how big is a token

Question: how many bytes does one token keep, and how many tokens fit?
Time: 15 minutes. Needs lesson 1.

Every token leaves a key and a value behind, in every layer. On a GPU, keys
and values share the memory with the weights, and what the weights leave
decides how many sequences can run together. So we need to know the size of
a token.
"""

from typing import NamedTuple

from paged_ref import LLM
from paged_ref.core.model.config import ModelConfig, kv_bytes_per_token
from paged_ref import llm as engine
from paged_ref.lesson import break_it, check, claim, plug_in
from paged_ref.lesson import predict, table, todo

# ## Predict
#
# These are the shapes of real models, as their config.json files have them:
# layers, heads of the queries, heads of K and V, size of a head. In older
# models each query head has its own head of K and V. In younger models a
# group of query heads shares one (grouped-query attention).

SHAPES = {
    "OPT-13B": (40, 40, 40, 128),
    "Llama-2-7B": (32, 32, 32, 128),
    "Llama-2-70B": (80, 64, 8, 128),
    "Llama-3.1-8B": (32, 32, 8, 128),
    "Qwen3-0.6B": (28, 16, 8, 128),
}
GIB, KIB = 2**30, 2**10

question = "What does a token of OPT-13B keep, at 2 bytes a number?"
opt = predict(question, "KiB")
llama3 = predict("And one of Llama-3.1-8B?", "KiB")

# ## Run
#
# The rest of a config does not matter here, so it is filled with ones.


def config_of(layers, heads, kv_heads, head_size):
    return ModelConfig(
        vocab_size=1, hidden_size=heads * head_size, intermediate_size=1,
        num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
        head_size=head_size, max_position_embeddings=1,
    )  # fmt: skip


sizes, rows = {}, []
for name, shape in SHAPES.items():
    size = kv_bytes_per_token(config_of(*shape), "float16")
    sizes[name] = size / KIB
    rows.append(
        (name, size // KIB, GIB // size, f"{2048 * size / GIB:.2f}")
    )
columns = ("float16", "KiB per token", "tokens in 1 GiB", "GiB for 2,048")
table("What a token keeps", columns, rows)
opt.grade(
    sizes["OPT-13B"],
    why="2 (K and V) x 40 layers x 40 heads x 128 x 2 bytes, over 1,024",
)
llama3.grade(
    sizes["Llama-3.1-8B"],
    why="2 x 32 layers x 8 heads of K and V x 128 x 2 bytes, over 1,024",
)

# The paper's example is OPT-13B on a GPU of 40 GB. The weights take about
# 65% of that, and close to 30% is left for K and V (Kwon et al. 2023, §1).
# How many sequences is that, if each may grow to 2,048 tokens?

LEFT = 0.30 * 40e9
size = kv_bytes_per_token(config_of(*SHAPES["OPT-13B"]), "float16")
tokens = int(LEFT / size)
claim(f"room for {tokens:,} tokens", tokens > 0)
claim("whole sequences of 2,048 tokens", tokens // 2048, 7)

# Few. And a GPU that decodes seven sequences together is mostly idle: it
# reads all weights for seven tokens. Memory decides the speed.

# ## What must hold
#
# A slot is the room for K and V of one token. The size of a token times
# the number of slots must be the bytes of the arrays. Here
# is the cache of a running engine, given a budget in bytes.

BUDGET = 1_000_000


def make_engine():
    llm = LLM(kv_cache_bytes=BUDGET, backend="reference")
    taken = llm.engine.kv.device.nbytes
    if taken > BUDGET:
        raise AssertionError(f"{taken:,} bytes taken of {BUDGET:,}")
    return taken, llm.engine.manager.num_slots


taken, slots = make_engine()
per_token = kv_bytes_per_token(LLM().config, "float32")
claim(f"{slots} slots of {per_token:,} bytes", taken, slots * per_token)

# What if the size of a token counts its keys and forgets its values? The
# engine plans twice the tokens, and the array does not fit. On a GPU this
# ends in an out-of-memory error, at the start or hours later.

break_it(
    "the values are forgotten in the size of a token",
    where=(engine, "format_bytes_per_token"),
    bug=lambda real: lambda config, dtype: real(config, dtype) // 2,
    run=make_engine, caught_by="integrity",
)  # fmt: skip

# ## Exercise
#
# Write the size down yourself. `config` has the fields of the table above:
# `num_layers`, `num_heads`, `num_kv_heads` and `head_size`.


def my_kv_bytes_per_token(config, itemsize):
    """Bytes of K and V that one token keeps, over all layers."""
    return todo("1 line")


class Config(NamedTuple):
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int


def spec(config, itemsize):
    return kv_bytes_per_token(config, f"float{8 * itemsize}")


cases = [(Config(*s), size) for s in SHAPES.values() for size in (2, 4)]
hint = (
    "Count the numbers that one token adds, then their bytes.\n"
    "A key and a value, in each layer, for each head of K and V."
)
mine = check(my_kv_bytes_per_token, spec=spec, cases=cases, hint=hint)

where = (engine, "format_bytes_per_token")
with plug_in(where, lambda config, dtype: mine(config, 4)):
    claim("slots of an engine that uses it", make_engine()[1], slots)

# ## In production systems
#
# At the start vLLM runs the model once with the largest batch, measures
# how much of a set share of the GPU is left, and makes blocks of all that
# is left. Tokens have become smaller, too: grouped queries share K and V,
# DeepSeek's latent attention keeps one small vector for all heads, and a
# cache of one-byte floats is half as large as one in float16.

# ## Next
#
# See it move: `paged-ref viz --frame 5`, the memory of a run.
#
# Lesson 3: how much of that memory held tokens, before paging.
