"""`paged-ref bench training`: ways to keep saved activations, what a step's time goes into, and torch's time.

The contenders take turns step by step, and the shortest time of each counts: a busy neighbour can only add time.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
from rich.table import Table

from ..core.device import on_gpu, synchronize, to_host, xp
from ..core.model.config import ModelConfig
from ..extras.memory_limit import require_memory
from ..training.activations import PAGE_SIZE, Keep, Paged, Recompute, Swap
from ..training.network import PackedBatch, loss_and_gradient, saved_shapes
from ..training.optimizer import AdamW
from ..training.parameters import Parameters
from ..tuned.threads import num_threads
from ..views.common import options
from ..views.common.console import Console
from ..views.common.versions import describe_device
from .results import shortest, table_of, timed, write_results

CONFIG = ModelConfig(  # the embedded model's sizes
    vocab_size=2048, hidden_size=128, intermediate_size=352, num_layers=5, num_heads=4, num_kv_heads=2, head_size=32,
    max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip
SHARES = (0.75, 0.5, 0.25)  # of what `keep` holds, as budgets
MIB = 2**20


@dataclass
class ActivationCost:
    """One way to keep activations. Sizes in bytes."""

    name: str
    budget: int | None
    held: int = 0  # saved activations on the device, at the most, as the code counts
    peak: int = 0  # all arrays on the device but weights and gradients, at the most, as the allocator counts
    moved: int = 0  # out and in, in one step
    seconds: float = math.inf
    equal: bool = False  # gradients, to the bit, to those of `keep`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.integer(parser, "--sequences", 4, "in a step")
    options.integer(parser, "--length", 512, "tokens of each")
    options.integer(parser, "--rounds", 5, "times that each takes its turn")
    options.size(parser, "--page-size", PAGE_SIZE, f"default {PAGE_SIZE // 1024}KiB")
    options.json_output(parser)


def main(args: argparse.Namespace) -> int:
    num_tokens = args.sequences * args.length
    what = f"--sequences is {args.sequences} and --length {args.length}: what the layers save of such a step"
    require_memory(what, _saved_bytes(CONFIG, num_tokens))
    rng = np.random.default_rng(0)
    tokens = rng.integers(CONFIG.vocab_size, size=(args.sequences, args.length + 1))
    weights = Parameters(CONFIG)
    weights.initialize(0)
    rows = memory(weights, tokens, args.page_size, args.rounds)
    console = Console()
    console.print(_memory_table(rows, args))
    results: dict[str, Any] = {"memory": [asdict(row) for row in rows]}
    if on_gpu:
        console.print("What a step's time goes into is measured on a CPU only; on a GPU, ask nsys.")
    else:
        results["profile"] = shares = profile(weights, tokens, args.rounds)
        console.print(_profile_table(shares))
    if on_gpu or importlib.util.find_spec("torch") is None:
        console.print("The comparison with torch is made on a CPU, and needs the extra `compare`.")
    else:
        results["step_times_torch"] = ratio = against_torch(weights, tokens, args.rounds)
        console.print(
            f"A step, forwards, backwards and AdamW: {ratio:.2f} times as long as torch eager's (asked: at most 2)"
        )
    write_results(args.json, **results)
    return 0


def _saved_bytes(config: ModelConfig, num_tokens: int) -> int:
    """What all layers save for backward, in float32."""
    return config.num_layers * 4 * sum(map(math.prod, saved_shapes(config, num_tokens).values()))


def memory(weights: Parameters, tokens: np.ndarray, page_size: int, rounds: int) -> list[ActivationCost]:
    """Every way to keep activations, on the same batch. `tokens [sequences, length + 1]`."""
    config, batch, num_tokens = weights.config, PackedBatch.of(list(tokens)), tokens[:, 1:].size
    everything = _saved_bytes(config, num_tokens)
    ways: list[tuple[ActivationCost, Any]] = [
        (ActivationCost("keep", None), Keep()),
        (ActivationCost("recompute", None), Recompute()),
    ]
    for share in SHARES:
        budget = int(share * everything)
        ways.append((ActivationCost("swap", budget), Swap(budget, config, num_tokens)))
        ways.append((ActivationCost("page", budget), Paged(budget, page_size, config, num_tokens)))
    gradient = Parameters(config)

    def step(activations: Any) -> None:
        gradient.flat[:] = 0
        activations.counts.clear()
        loss_and_gradient(weights, gradient, batch, activations)
        synchronize()

    wanted: np.ndarray | None = None
    for row, activations in ways:
        step(activations)  # warm
        with _peak() as peak:
            step(activations)
        found = to_host(gradient.flat).copy()
        wanted = found if wanted is None else wanted
        counts = activations.counts
        pool = activations.pool_size if isinstance(activations, Paged) else 0
        row.equal = bool(np.array_equal(found, wanted))
        row.held, row.moved, row.peak = counts.peak, counts.moved_out + counts.moved_in, peak[0] + pool
    times = shortest([partial(step, activations) for _, activations in ways], rounds)
    return [replace(row, seconds=taken.seconds) for (row, _), taken in zip(ways, times, strict=True)]


@contextmanager
def _peak() -> Iterator[list[int]]:
    """The most bytes that were allocated at the same time, above those at the beginning, as the allocator counts.

    On a CPU, Python's own tracer, to which NumPy reports; on a GPU, a hook of CuPy's memory pool.
    """
    peak = [0]
    if on_gpu:

        class Hook(xp.cuda.MemoryHook):  # type: ignore[misc]
            name, now = "peak", 0

            def malloc_postprocess(self, **facts: int) -> None:
                self.now += facts["mem_size"]
                peak[0] = max(peak[0], self.now)

            def free_postprocess(self, **facts: int) -> None:
                self.now -= facts["mem_size"]

        with Hook():
            yield peak
        return
    tracemalloc.start()
    try:
        yield peak
        peak[0] = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class Timed(np.ndarray):
    """An array whose operations, and those of all arrays computed from it, are timed by name in `Timed.seconds`."""

    seconds: ClassVar[dict[str, float]] = defaultdict(float)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        plain = [x.view(np.ndarray) if isinstance(x, Timed) else x for x in inputs]
        if out is not None:
            options["out"] = tuple(x.view(np.ndarray) if isinstance(x, Timed) else x for x in out)
        began = perf_counter()
        result = getattr(ufunc, method)(*plain, **options)
        name = ufunc.__name__ if method == "__call__" else f"{ufunc.__name__}.{method}"
        Timed.seconds[name] += perf_counter() - began
        if out is not None:
            return out[0]
        return result.view(Timed) if isinstance(result, np.ndarray) else result


def profile(weights: Parameters, tokens: np.ndarray, rounds: int) -> dict[str, float]:
    """The share of a step's time in each kind of NumPy operation; the rest is `other`.

    The operations are timed in one step, and the whole in another: timing the operations takes time too.
    """
    watched, gradient = Parameters(weights.config), Parameters(weights.config)
    watched.flat[:] = weights.flat
    for arrays in (watched, gradient):
        arrays.embedding, arrays.final_norm = arrays.embedding.view(Timed), arrays.final_norm.view(Timed)
        arrays.layers = [
            type(layer)(**{name: getattr(layer, name).view(Timed) for name in layer.__slots__})
            for layer in arrays.layers
        ]
    batch, best, whole = PackedBatch.of(list(tokens)), math.inf, math.inf
    spent: dict[str, float] = {}
    for _ in range(rounds + 1):
        Timed.seconds.clear()
        seconds = timed(partial(loss_and_gradient, watched, gradient, batch, Keep())).seconds
        if seconds < best:
            best, spent = seconds, dict(Timed.seconds)
        whole = min(whole, timed(partial(loss_and_gradient, weights, gradient, batch, Keep())).seconds)
    longest = sorted(spent.items(), key=lambda item: -item[1])[:8]
    shares = {name: seconds / whole for name, seconds in longest}
    return {**shares, "other": 1 - sum(shares.values())}


def against_torch(weights: Parameters, tokens: np.ndarray, rounds: int) -> float:
    """How many times as long as torch eager a step takes: the same weights, batch and optimizer, taking turns."""
    import torch

    from .torch_decoder import TorchDecoder, training_step

    rate, decay = 1e-3, 0.1
    torch.set_num_threads(num_threads())
    theirs = training_step(TorchDecoder(weights), tokens, rate, decay)
    own, gradient, activations = Parameters(weights.config), Parameters(weights.config), Keep()
    own.flat[:] = weights.flat
    batch, ends = PackedBatch.of(list(tokens)), own.num_in_matrices
    optimizers = [
        AdamW(own.flat[:ends], gradient.flat[:ends], decay), AdamW(own.flat[ends:], gradient.flat[ends:], 0.0)
    ]  # fmt: skip
    steps = count(1)

    def ours() -> float:
        gradient.flat[:] = 0
        loss = loss_and_gradient(own, gradient, batch, activations)
        number = next(steps)
        for optimizer in optimizers:
            optimizer.step(rate, number)
        return loss

    for _ in range(3):
        loss, wanted = ours(), theirs()
        if not abs(loss - wanted) < 1e-3 * wanted:
            raise RuntimeError(f"the loss is {loss} here and {wanted} in torch")
    torch_times, our_times = shortest((theirs, ours), rounds)
    return our_times.seconds / torch_times.seconds


def _memory_table(costs: list[ActivationCost], args: argparse.Namespace) -> Table:
    def row(cost: ActivationCost) -> tuple[str, ...]:
        budget = "" if cost.budget is None else f"{cost.budget / MIB:.1f}"
        sizes = (f"{size / MIB:.1f}" for size in (cost.held, cost.peak, cost.moved))
        equal = "equal" if cost.equal else "DIFFER"
        return cost.name, budget, *sizes, f"{1e3 * cost.seconds:.0f}", f"{cost.seconds / costs[0].seconds:.2f}", equal

    headings = ("", "budget", "held", "peak", "moved", "ms", "time", "gradients")
    title = f"Activations of {args.sequences} sequences of {args.length} tokens, {describe_device()}; MiB"
    return table_of(headings, map(row, costs), title=title)


def _profile_table(shares: dict[str, float]) -> Table:
    title = "What the time of a step goes into (asked: matmul at least 60 %)"
    rows = [(name, f"{100 * share:.0f} %") for name, share in shares.items()]
    table = table_of(("operation", "share"), rows, title=title)
    table.columns[0].justify = "left"
    return table
