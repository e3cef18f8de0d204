"""How long one step of an engine takes on a GPU, from what the step must read and multiply.

The roofline (Williams et al. 2009): a step takes as long as the slower of two sides, reading memory or doing
arithmetic, and the engine adds its overhead. Everything is counted from the shapes of the model; the assumptions are
in `Constants`, each with its reason, and `explain` lists them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from ..core.memory.manager import Transfer
from .hardware import GIB, GPU
from .model_config import ModelSpec

Bound = Literal["bandwidth", "compute", "link", "overhead"]


def _constant(default: float, why: str) -> Any:
    return field(default=default, metadata={"why": why})


@dataclass(frozen=True, slots=True)
class Constants:
    """Assumptions, since no datasheet has them. Shares are of the published peak."""

    bandwidth_share: float = _constant(0.8, "of the memory's bandwidth that kernels reach, reading weights and K, V")
    compute_share: float = _constant(0.6, "of the peak arithmetic that matrix products of a prefill reach")
    link_share: float = _constant(0.8, "of the host link that one large copy from page-locked memory reaches")
    step_overhead: float = _constant(0.002, "seconds of a step for scheduling, launches and sampling")
    copy_overhead: float = _constant(5e-6, "seconds that each single copy over the host link costs, however small")
    memory_share: float = _constant(0.9, "of the GPU's memory for weights, K and V; the rest: activations, CUDA itself")
    peer_share: float = _constant(0.8, "of the link between GPUs, one direction, that an all-reduce reaches")
    reduce_overhead: float = _constant(1e-5, "seconds that each all-reduce costs, however small; two in a layer")

    def __post_init__(self) -> None:
        for constant in fields(self):
            value = getattr(self, constant.name)
            is_share = constant.name.endswith("_share")
            if not (0 < value <= 1 if is_share else 0 <= value < float("inf")):
                raise ValueError(f"{constant.name} is {value}; {'above 0 to 1' if is_share else '0 or more'} is needed")


CONSTANTS = Constants()


def explain(constants: Constants = CONSTANTS) -> list[tuple[str, float, str]]:
    """(name, value, meaning) of each constant."""
    return [(each.name, getattr(constants, each.name), each.metadata["why"]) for each in fields(constants)]


class StepTime(NamedTuple):
    """The sides of one step, in seconds. Reading and arithmetic overlap; traffic and overhead do not."""

    weights: float  # to read them once; of experts those that a token of the step uses
    kv: float  # to read K and V
    compute: float
    link: float  # all-reduces between the GPUs
    overhead: float

    @property
    def seconds(self) -> float:
        return max(self.weights + self.kv, self.compute) + self.link + self.overhead

    @property
    def bound(self) -> Bound:
        """What the step waits for most."""
        reading = self.weights + self.kv
        sides: dict[Bound, float] = {
            "bandwidth": reading,
            "compute": self.compute,
            "link": self.link,
            "overhead": self.overhead,
        }
        return max(sides, key=sides.__getitem__)


def chunk_pairs(seq_len: int, num_tokens: int) -> int:
    """Keys that the last `num_tokens` tokens of a sequence of `seq_len` see together, causally."""
    return num_tokens * seq_len - num_tokens * (num_tokens - 1) // 2


class Roofline:
    """One model on one GPU: the seconds of steps and transfers, and the memory for K and V."""

    def __init__(self, gpu: GPU, model: ModelSpec, constants: Constants = CONSTANTS) -> None:
        self.gpu, self.model, self.constants = gpu, model, constants
        # More GPUs than KV heads keep a head more than once. A model by hand has no heads: its K and V split evenly.
        self.kv_copies = max(1.0, gpu.count / (model.num_kv_heads or gpu.count))
        self.bandwidth = gpu.bandwidth * constants.bandwidth_share
        head = model.vocab_size * model.hidden_size  # the matrix that turns a hidden state into logits
        arithmetic = gpu.flops * constants.compute_share
        weight_seconds = model.weight_bits / 8 / self.bandwidth  # to read one
        # A simulation asks for the seconds of millions of steps, so what is fixed is multiplied out here.
        self.weights = (model.num_parameters - model.num_looked_up - model.num_routed) * weight_seconds
        self.experts = model.num_routed * weight_seconds  # to read all of them
        self.unused_share = 1 - model.routed_share  # of the experts, by one token
        self.kv_seconds = (
            model.kv_bytes_per_token * self.kv_copies / self.bandwidth
        )  # for each token whose K and V are read
        # a product and a sum for each weight
        self.token_seconds = 2 * (model.num_active - model.num_looked_up - head) / arithmetic
        self.logits_seconds = 2 * head / arithmetic
        self.pair_seconds = model.pair_operations * model.kv_share / arithmetic  # q.k, the sum over values
        self.reduce_seconds, self.reduce_token_seconds = self._all_reduces()

    def _all_reduces(self) -> tuple[float, float]:
        """(seconds of a step, more for each of its tokens) of the sums over all GPUs: of the hidden states in 16 bits,
        after attention and after the feed-forward part of each layer. In a ring each GPU sends 2 (n - 1) / n of them
        (Patarasuk and Yuan 2009)."""
        gpu, model, constants = self.gpu, self.model, self.constants
        if gpu.count == 1:
            return 0.0, 0.0
        sent = 2 * (gpu.count - 1) / gpu.count * 2 * model.hidden_size  # bytes
        reductions = 2 * model.num_layers
        return reductions * constants.reduce_overhead, reductions * sent / (gpu.peer * constants.peer_share)

    # --- a step ------------------------------------------------------------------------------------

    def step(
        self, num_tokens: float, kv_tokens: float, pairs: float | None = None, num_logits: float | None = None
    ) -> StepTime:
        """The time of a step that computes `num_tokens` tokens and reads the K and V of `kv_tokens`.

        `kv_tokens` is the sum of the sequences' lengths, this step's tokens included: a kernel reads each key once for
        all queries of its sequence. `pairs` is how many keys all queries see together (default: `kv_tokens`, which is
        a step of decodes; `chunk_pairs` gives it for a chunk of prefill). `num_logits` is for how many tokens the head
        is computed (default: all).
        """
        pairs = kv_tokens if pairs is None else pairs
        num_logits = num_tokens if num_logits is None else num_logits
        return StepTime(
            weights=self.weight_seconds(num_tokens),
            kv=self.kv_seconds * kv_tokens,
            compute=self.token_seconds * num_tokens + self.pair_seconds * pairs + self.logits_seconds * num_logits,
            link=self.reduce_seconds + self.reduce_token_seconds * num_tokens,
            overhead=self.constants.step_overhead,
        )

    def weight_seconds(self, num_tokens: float) -> float:
        """To read the weights that the tokens of a step use. Each token uses its share of the experts, which are taken
        to be equally likely, so n tokens leave (1 - share)^n of them unread."""
        if not self.experts:
            return self.weights
        return self.weights + self.experts * (1 - float(self.unused_share**num_tokens))

    def seconds(self, num_tokens: int, kv_tokens: int, pairs: int, num_logits: int) -> float:
        """`step(...).seconds`, in a third of the time."""
        read = self.kv_seconds * kv_tokens + (self.weight_seconds(num_tokens) if self.experts else self.weights)
        compute = self.token_seconds * num_tokens + self.pair_seconds * pairs + self.logits_seconds * num_logits
        link = self.reduce_seconds + self.reduce_token_seconds * num_tokens
        return (read if read > compute else compute) + link + self.constants.step_overhead

    # --- transfers ---------------------------------------------------------------------------------

    def link_seconds(self, num_bytes: float, num_copies: int) -> float:
        """Time to bring bytes over the host link, one way, in `num_copies` single copies."""
        link = self.gpu.link * self.constants.link_share
        return num_bytes / link + num_copies * self.constants.copy_overhead

    def transfers(self, transfers: Iterable[Transfer], row_tokens: int) -> tuple[float, int, int]:
        """(seconds, bytes moved on the device, bytes over the link) of transfers whose rows are `row_tokens` tokens.

        A transfer is one copy in each array: K and V of each layer, as in vLLM. Bytes that move on the device are read
        and written. The step waits for its transfers: none is hidden behind other work.
        """
        seconds, on_device, over_link = 0.0, 0, 0
        for transfer in transfers:
            num_bytes = transfer.count * row_tokens * self.model.kv_bytes_per_token
            if transfer.kind in ("copy", "move"):
                on_device += num_bytes
                seconds += 2 * num_bytes / self.bandwidth
            else:
                over_link += num_bytes
                seconds += self.link_seconds(num_bytes, self.model.num_arrays)
        return seconds, on_device, over_link

    def swap_seconds(self, num_tokens: int, block_size: int) -> float:
        """Out and in again, each block a copy for K and for V of each layer."""
        blocks = -(-num_tokens // block_size)
        num_bytes = blocks * block_size * self.model.kv_bytes_per_token
        return 2 * self.link_seconds(num_bytes, self.model.num_arrays * blocks)

    def recompute_seconds(self, num_tokens: int) -> float:
        """All tokens once more, as one prompt: the arithmetic alone, since other sequences share the step."""
        return self.step(num_tokens, num_tokens, chunk_pairs(num_tokens, num_tokens), 1).compute

    def swap_from(self, block_size: int) -> int | None:
        """The length from which on swapping is faster than computing again; None: never, up to the model's context.

        The time to compute again grows with the square of the length, that of swapping does not. So the search goes
        down from the longest length to the last one at which swapping is slower.
        """
        lengths = range(block_size, self.model.max_context + 1, block_size)
        slower = (
            length
            for length in reversed(lengths)
            if self.swap_seconds(length, block_size) >= self.recompute_seconds(length)
        )
        first = next(slower, 0) + block_size
        return first if first in lengths else None

    # --- memory ------------------------------------------------------------------------------------

    def kv_cache_bytes(self) -> int:
        """The memory that the weights leave for K and V.

        Raises ValueError where nothing is left, and says how many GPUs or how small weights would do.
        """
        gpu, model, share = self.gpu, self.model, self.constants.memory_share
        room = int(gpu.memory_bytes * share)
        if room > model.weight_bytes:
            return room - model.weight_bytes
        needed = 1
        while needed * room / gpu.count <= model.weight_bytes:
            needed *= 2
        smaller = [bits for bits in (8, 4) if bits < model.weight_bits and model.num_parameters * bits / 8 < room]
        quantized = f", or its weights in {smaller[0]} bits" if smaller else ""
        raise ValueError(
            f"{model.name} has {model.weight_bytes / GIB:.1f} GiB of weights; {gpu.name} has {room / GIB:.1f} GiB for "
            f"them ({share:.0%} of {gpu.memory_bytes / GIB:.0f}). {needed} such GPUs hold it{quantized}"
        )

    def num_kv_tokens(self) -> int:
        """Tokens whose K and V fit beside the weights. Raises ValueError as kv_cache_bytes does, or if none fits."""
        each = self.model.kv_bytes_per_token * self.kv_copies
        tokens = int(self.kv_cache_bytes() / each)
        if tokens < 1:
            raise ValueError(
                f"{self.gpu.name} has no room for the K and V of one token beside {self.model.name}: {each:,.0f} bytes"
            )
        return tokens
