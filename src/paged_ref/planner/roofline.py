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
from .models import ModelSpec

Bound = Literal["bandwidth", "compute", "overhead"]


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
    """The sides of one step, in seconds. Reading and arithmetic overlap; the overhead does not."""

    weights: float  # to read them once
    kv: float  # to read K and V
    compute: float
    overhead: float

    @property
    def seconds(self) -> float:
        return max(self.weights + self.kv, self.compute) + self.overhead

    @property
    def bound(self) -> Bound:
        """What the step waits for most."""
        sides: dict[Bound, float] = {
            "bandwidth": self.weights + self.kv,
            "compute": self.compute,
            "overhead": self.overhead,
        }
        return max(sides, key=sides.__getitem__)


def step_time(
    gpu: GPU,
    model: ModelSpec,
    num_tokens: int,
    kv_tokens_read: int,
    query_key_pairs: int | None = None,
    num_logits: int | None = None,
    constants: Constants = CONSTANTS,
) -> StepTime:
    """The time of a step that computes `num_tokens` tokens and reads the K and V of `kv_tokens_read`.

    `kv_tokens_read` is the sum of the sequences' lengths, this step's tokens included: a kernel reads each key
    once for all queries of its sequence. `query_key_pairs` is how many keys all queries see together (default:
    kv_tokens_read, which is a step of decodes; `chunk_pairs` gives it for a chunk of prefill). `num_logits` is
    for how many tokens the head is computed (default: all).
    """
    pairs = kv_tokens_read if query_key_pairs is None else query_key_pairs
    logits = num_tokens if num_logits is None else num_logits
    bandwidth = gpu.bandwidth * constants.bandwidth_share
    weights_read = (model.num_parameters - model.num_looked_up) * model.weight_bits / 8
    in_layers = model.num_parameters - model.num_looked_up - model.num_head_parameters
    flops = 2 * (in_layers * num_tokens + model.num_head_parameters * logits)  # a product and a sum for each weight
    flops += 4 * model.num_layers * model.num_heads * model.head_size * pairs  # q.k, and the sum over values
    return StepTime(
        weights=weights_read / bandwidth,
        kv=kv_tokens_read * model.kv_bytes_per_token * kv_copies(gpu, model) / bandwidth,
        compute=flops / (gpu.flops * constants.compute_share),
        overhead=constants.step_overhead,
    )


def chunk_pairs(seq_len: int, num_tokens: int) -> int:
    """Keys that the last `num_tokens` tokens of a sequence of `seq_len` see together, causally."""
    return num_tokens * seq_len - num_tokens * (num_tokens - 1) // 2


def transfer_seconds(gpu: GPU, num_bytes: float, num_copies: int = 1, constants: Constants = CONSTANTS) -> float:
    """Time to bring bytes over the host link, one way, in `num_copies` single copies."""
    return num_bytes / (gpu.link * constants.link_share) + num_copies * constants.copy_overhead


class StepClock:
    """Seconds of steps and transfers on one GPU with one model.

    A simulation asks it for every step of millions of tokens, so all that is fixed is multiplied out before.
    """

    def __init__(self, gpu: GPU, model: ModelSpec, constants: Constants = CONSTANTS) -> None:
        # step_time is linear in its four counts, so five of its answers give all others.
        def sides(tokens: int, kv: int, pairs: int, logits: int) -> tuple[float, float]:
            time = step_time(gpu, model, tokens, kv, pairs, logits, constants)
            return time.weights + time.kv, time.compute

        self._weights, _ = sides(0, 0, 0, 0)
        self._kv = sides(0, 1, 0, 0)[0] - self._weights
        _, self._token = sides(1, 0, 0, 0)
        _, self._pair = sides(0, 0, 1, 0)
        _, self._logit = sides(0, 0, 0, 1)
        self._overhead = constants.step_overhead
        self._gpu, self._constants = gpu, constants
        self._bandwidth = gpu.bandwidth * constants.bandwidth_share
        self._arrays = 2 * model.num_layers  # K and V of each layer are separate arrays
        self._kv_bytes = model.kv_bytes_per_token

    def step(self, num_tokens: int, kv_tokens_read: int, pairs: int, num_logits: int) -> float:
        """Seconds of a step; the arguments are those of step_time."""
        read = self._weights + self._kv * kv_tokens_read
        compute = self._token * num_tokens + self._pair * pairs + self._logit * num_logits
        return (read if read > compute else compute) + self._overhead

    def decode(self, num_seqs: int, kv_tokens_read: int) -> float:
        """Seconds of a step in which each of the sequences computes one token."""
        return self.step(num_seqs, kv_tokens_read, kv_tokens_read, num_seqs)

    def transfers(self, transfers: Iterable[Transfer], row_tokens: int) -> tuple[float, int, int]:
        """(seconds, bytes moved on the device, bytes over the link) of transfers whose rows are `row_tokens` tokens.

        A transfer is one copy in each array. Bytes that move on the device are read and written. The step waits for
        its transfers: none is hidden behind other work.
        """
        seconds, on_device, over_link = 0.0, 0, 0
        for transfer in transfers:
            num_bytes = transfer.count * row_tokens * self._kv_bytes
            if transfer.kind in ("copy", "move"):
                on_device += num_bytes
                seconds += 2 * num_bytes / self._bandwidth
            else:
                over_link += num_bytes
                seconds += transfer_seconds(self._gpu, num_bytes, self._arrays, self._constants)
        return seconds, on_device, over_link


def swap_seconds(
    gpu: GPU, model: ModelSpec, num_tokens: int, block_size: int, constants: Constants = CONSTANTS
) -> float:
    """Out and in again. K and V of each layer are separate arrays, as in vLLM: 2 copies for each layer and block."""
    blocks = -(-num_tokens // block_size)
    copies = 2 * model.num_layers * blocks
    return 2 * transfer_seconds(gpu, blocks * block_size * model.kv_bytes_per_token, copies, constants)


def recompute_seconds(gpu: GPU, model: ModelSpec, num_tokens: int, constants: Constants = CONSTANTS) -> float:
    """All tokens once more, as one prompt: the arithmetic alone, since other sequences share the step."""
    pairs = chunk_pairs(num_tokens, num_tokens)
    return step_time(gpu, model, num_tokens, num_tokens, pairs, 1, constants).compute


def swap_from(gpu: GPU, model: ModelSpec, block_size: int, constants: Constants = CONSTANTS) -> int | None:
    """The length from which on swapping is faster than computing again; None: it never is, up to the model's context.

    The time to compute again grows with the square of the length, that of swapping does not. So the search goes down
    from the longest length to the last one at which swapping is slower.
    """
    lengths = range(block_size, model.max_context + 1, block_size)
    slower = (
        length
        for length in reversed(lengths)
        if swap_seconds(gpu, model, length, block_size, constants) >= recompute_seconds(gpu, model, length, constants)
    )
    last = next(slower, 0)
    return last + block_size if last + block_size in lengths else None


def kv_copies(gpu: GPU, model: ModelSpec) -> float:
    """How often K and V are kept: more than once where there are more GPUs than KV heads."""
    return max(1.0, gpu.count / model.num_kv_heads)


def kv_cache_bytes(gpu: GPU, model: ModelSpec, constants: Constants = CONSTANTS) -> int:
    """The memory that the weights leave for K and V.

    Raises ValueError where nothing is left, and says how many GPUs or how small weights would do.
    """
    room = int(gpu.memory_bytes * constants.memory_share)
    left = room - model.weight_bytes
    if left > 0:
        return left
    one = room / gpu.count
    needed = next(count for count in (2**i for i in range(40)) if count * one > model.weight_bytes)
    smaller = [bits for bits in (8, 4) if bits < model.weight_bits and model.num_parameters * bits / 8 < room]
    quantized = f", or its weights in {smaller[0]} bits" if smaller else ""
    raise ValueError(
        f"{model.name} has {model.weight_bytes / GIB:.1f} GiB of weights; {gpu.name} has {room / GIB:.1f} GiB for "
        f"them ({constants.memory_share:.0%} of {gpu.memory_bytes / GIB:.0f}). "
        f"{needed} such GPUs hold it{quantized}"
    )


def num_kv_tokens(gpu: GPU, model: ModelSpec, constants: Constants = CONSTANTS) -> int:
    """Tokens whose K and V fit beside the weights. Raises ValueError as kv_cache_bytes does, or if none fits."""
    each = model.kv_bytes_per_token * kv_copies(gpu, model)
    tokens = int(kv_cache_bytes(gpu, model, constants) / each)
    if tokens < 1:
        raise ValueError(f"{gpu.name} has no room for the K and V of one token beside {model.name}: {each:,.0f} bytes")
    return tokens
