"""RoPE beyond the context of the first training: the scalings that config.json can name, and the angles they give."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ..core.device import Array, xp

Kind = Literal["linear", "dynamic", "yarn", "longrope", "llama3"]
KINDS = get_args(Kind)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How RoPE is stretched. Each kind uses `factor`, `original` and what is named after it."""

    kind: Kind
    factor: float  # of the stretched context to the first one
    original: int  # tokens of the context that the model was first trained on
    magnitude: float = 1.0  # of queries and keys (yarn, longrope): transformers' attention_factor
    slow: float = 1.0  # llama3, yarn: pairs that turn less often than this in the first context are stretched
    fast: float = 32.0  # llama3, yarn: pairs that turn more often than this are left as they are
    truncate: bool = True  # yarn: the ramp between the two begins and ends at whole pairs
    short_factors: tuple[float, ...] = ()  # longrope: a divisor for each pair, up to the first context
    long_factors: tuple[float, ...] = ()  # longrope: and beyond it


class Rope:
    """RoPE of one base `theta`, for heads of `head_size` and sequences of at most `longest` tokens.

    A token's angles depend on its position and on nothing else of a step, so that chunks, batches and recomputation
    change no token. Hence two differences from transformers, which looks at the longest sequence of a forward pass:
    `longrope` takes the long divisors for all sequences where `longest` is beyond the first context (as vLLM does), and
    `dynamic` turns each token as if the sequence ended with it (as transformers does for tokens fed one at a time).
    """

    def __init__(self, theta: float, head_size: int, scaling: RopeScaling | None, longest: int) -> None:
        self.theta, self.scaling = theta, scaling
        self.exponents = np.arange(0, head_size, 2) / head_size  # [head_size // 2]
        self.frequencies = self._scaled(longest)  # [head_size // 2] float64, radians from one position to the next
        self.dynamic = scaling if scaling is not None and scaling.kind == "dynamic" else None
        self.magnitude = 1.0 if scaling is None else scaling.magnitude
        frequencies = xp.asarray(self.frequencies, dtype=np.float32)
        self._turns = xp.concatenate([-frequencies, frequencies])  # [head_size], as llama.rotate wants them

    def turns(self, positions: Array, dtype: np.dtype) -> tuple[Array, Array]:
        """For `positions [num_tokens]`: cos and sin as llama.rotate wants them, [num_tokens, 1, head_size] each."""
        angles = positions.astype(np.float32)[:, None] * (
            self._turns if self.dynamic is None else self._grown(positions)
        )
        cos, sin = xp.cos(angles)[:, None], xp.sin(angles)[:, None]
        if self.magnitude != 1:
            cos, sin = cos * np.float32(self.magnitude), sin * np.float32(self.magnitude)
        return cos.astype(dtype, copy=False), sin.astype(dtype, copy=False)

    def _grown(self, positions: Array) -> Array:
        """`dynamic`: beyond the first context, theta grows with the length: [num_tokens, head_size] float32."""
        assert self.dynamic is not None
        factor, original, size = self.dynamic.factor, self.dynamic.original, 2 * len(self.exponents)
        lengths = xp.maximum(positions + 1, original).astype(np.float64)  # [num_tokens]
        thetas = self.theta * (factor * lengths / original - (factor - 1)) ** (size / (size - 2))  # [num_tokens]
        frequencies = thetas[:, None] ** -xp.asarray(self.exponents)  # [num_tokens, head_size // 2]
        return xp.concatenate([-frequencies, frequencies], axis=1).astype(np.float32)

    def _scaled(self, longest: int) -> np.ndarray:
        """theta^(-2i / head_size) (Su et al. 2021), scaled: [head_size // 2]."""
        plain: np.ndarray = self.theta**-self.exponents
        scaling = self.scaling
        if scaling is None or scaling.kind == "dynamic":
            return plain
        if scaling.kind == "linear":  # positions lie closer (Chen et al. 2023)
            return np.asarray(plain / scaling.factor)
        if scaling.kind == "longrope":  # divisors found by search (Ding et al. 2024)
            return np.asarray(plain / (scaling.long_factors if longest > scaling.original else scaling.short_factors))
        kept = _by_dimension(scaling, self.theta, len(plain)) if scaling.kind == "yarn" else _by_turns(scaling, plain)
        return np.asarray(kept * plain + (1 - kept) * plain / scaling.factor)


def _by_turns(scaling: RopeScaling, plain: np.ndarray) -> np.ndarray:
    """llama3: how far each pair keeps its frequency, by the turns it makes in the first context, on a ramp from 0 to 1
    (Grattafiori et al. 2024)."""
    turns = scaling.original * plain / (2 * np.pi)
    return np.asarray(np.clip((turns - scaling.slow) / (scaling.fast - scaling.slow), 0, 1))


def _by_dimension(scaling: RopeScaling, theta: float, num_pairs: int) -> np.ndarray:
    """yarn: the same by the number of the pair, on a ramp between the pairs that make `fast` and `slow` turns (Peng et
    al. 2023)."""

    def pair_of(turns: float) -> float:
        return num_pairs * math.log(scaling.original / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair_of(scaling.fast), pair_of(scaling.slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    last += 0.001 * (first == last)  # as transformers keeps from dividing by 0
    return np.asarray(1 - np.clip((np.arange(num_pairs) - first) / (last - first), 0, 1))
