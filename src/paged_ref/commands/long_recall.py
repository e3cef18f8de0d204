"""How much of the attention a choice of blocks covers: by relevance, by the best choice, by chance, by recency.

The model runs over the text exactly. For each new token, in each layer and for each KV head, the true share of every
block is known, and so is the share that each way to choose would have covered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.table import Table

from ..beyond_device.kv import StreamedKV
from ..beyond_device.observation import Observation
from ..beyond_device.relevance import budget_of, choose
from ..core.device import on_gpu
from ..extras.sampling_params import SamplingParams
from ..llm import LLM
from ..views.common.console import Console

BUDGETS = (0.05, 0.10, 0.25, 0.50)
CHOICES = ("oracle", "relevance", "random", "recent")


Shares = dict[tuple[float, str], float]


def recall(model: str, ids: Sequence[int], new_tokens: int, block_size: int, seed: int = 0) -> Shares:
    """(budget, choice) to the mean share of attention mass, over tokens, heads and the layers that choose."""
    # A budget of all blocks: every layer keeps its bounds, and attends to everything. On a GPU a part of the device is
    # for staging, and the blocks that have no room beside it lie on the host.
    num_blocks = -(-(len(ids) + new_tokens) // block_size) + 1
    llm = LLM(
        model, device_blocks=num_blocks, host_blocks=num_blocks if on_gpu else 0, block_size=block_size, attend=1.0,
        full_layers=0, max_model_len=len(ids) + new_tokens, beyond_context=True,
    )  # fmt: skip
    kv = llm.engine.kv
    assert isinstance(kv, StreamedKV)
    full_layers = max(1, llm.config.num_layers // 16)
    rng = np.random.default_rng(seed)
    covered: dict[tuple[float, str], list[float]] = {(b, c): [] for b in BUDGETS for c in CHOICES}

    def observe(seen: Observation) -> None:
        if seen.layer < full_layers:
            return
        num_blocks = seen.mass.shape[-1]
        mass = seen.mass.mean(axis=1)  # [num_kv_heads, num_blocks]: a group of query heads reads the same blocks
        random = rng.random(mass.shape)
        for budget in BUDGETS:
            count = budget_of(budget, num_blocks)
            chosen = {
                "oracle": np.argsort(-mass, axis=1)[:, :count],
                "relevance": choose(seen.scores, count),
                "random": choose(random, count),
                "recent": np.tile(np.arange(num_blocks - count, num_blocks), (len(mass), 1)),
            }
            for name, blocks in chosen.items():
                covered[budget, name].append(float(np.take_along_axis(mass, blocks, axis=1).sum(axis=1).mean()))

    def begin_to_observe(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
        kv.observe = observe  # the prompt has been read
        return logits

    llm.generate([list(ids)], SamplingParams(max_tokens=new_tokens, ignore_eos=True, logits_hook=begin_to_observe))
    return {key: float(np.mean(values)) for key, values in covered.items()}


def print_recall(console: Console, found: Shares, model: str, tokens: int, new_tokens: int, block_size: int) -> None:
    title = (
        f"Share of attention mass in the chosen blocks: {model}, {tokens} tokens, blocks of {block_size}\n"
        f"(mean over {new_tokens} tokens, all heads, and the layers that choose)"
    )
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("budget")
    for choice in CHOICES:
        table.add_column(choice, justify="right")
    for budget in BUDGETS:
        table.add_row(f"{budget:.0%}", *(f"{found[budget, choice]:.1%}" for choice in CHOICES))
    console.print(table)
    console.print(
        "oracle: the best blocks, seen from the scores themselves. recent: the last ones only.\n"
        "random and relevance always keep the first block and the last."
    )
