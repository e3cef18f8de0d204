"""The training loop, and the state from which a run that was stopped continues to the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Any

import numpy as np

from ..core.checks import plural, require
from ..core.device import Array, to_host, xp
from ..core.model.config import ModelConfig
from ..core.model.tokenizer import Tokenizer
from ..tuned.threads import blas_threads
from .checkpoint import State
from .corpus import batches, encode
from .network import Activations, Dropout, PackedBatch, loss_and_gradient, total_loss
from .optimizer import AdamW, Muon, Optimizer, clip, learning_rate
from .parameters import Parameters, require_numbers


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train. On one machine, settings, text and sizes of the model determine the weights to the bit."""

    num_steps: int
    batch_tokens: int = 4096  # of one step
    micro_tokens: int = 2048  # of these, computed together; the gradients of all parts add up
    optimizer: str = "adamw"  # of the layers' matrices: "adamw" or "muon"; for the rest always AdamW
    learning_rate: float = 3e-3  # the highest
    warmup: int = 100  # steps
    weight_decay: float = 0.1
    dropout: float = 0.1
    clip: float = 1.0  # the longest gradient
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer is {self.optimizer!r}; known are 'adamw' and 'muon'")
        require(**{name: (getattr(self, name), 1) for name in ("num_steps", "batch_tokens", "micro_tokens")})
        require(**{name: (getattr(self, name), 0) for name in ("warmup", "weight_decay", "seed")})
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; a finite number above 0 is needed")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; at least 0 and below 1 is needed")


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """What one step did."""

    number: int  # the first is 1
    loss: float  # nats for each token, mean over the batch
    gradient: float  # the length of the gradient before the clip
    num_tokens: int
    seconds: float


class Trainer:
    """One run: call `step()` until `done`. Between steps, `state()` gives a state that `restore()` continues from."""

    def __init__(
        self, config: ModelConfig, settings: Settings, stories: Sequence[np.ndarray], activations: Activations
    ) -> None:
        """`stories`: the token ids of each, with END at the end, as corpus.encode returns them. Raises ValueError."""
        self.settings, self.activations = settings, activations
        context = config.max_position_embeddings
        num_tokens = sum(map(len, stories))
        if num_tokens <= context:
            raise ValueError(
                f"the text is too short: {plural(num_tokens, 'token')} to learn from; more than a context of {context} "
                "is needed"
            )
        self.weights, self.gradient = Parameters(config), Parameters(config)
        self.weights.initialize(settings.seed)
        self.optimizers = _optimizers(settings, self.weights, self.gradient)
        self.losses: list[float] = []  # of each step made
        self._stories = stories
        self._batches = batches(stories, context, settings.batch_tokens, settings.seed)

    @property
    def done(self) -> bool:
        return len(self.losses) >= self.settings.num_steps

    def step(self, whole: Callable[[], AbstractContextManager[object]] = nullcontext) -> TrainingStep:
        """Compute one batch forwards and backwards, and move the weights.

        An exception before the block `whole()`, in which the weights move, leaves the state of the last step.
        Raises ValueError, and moves no weight, where the loss or the gradient is no number.
        """
        with blas_threads(self.weights.embedding.size):
            return self._step(whole)

    def _step(self, whole: Callable[[], AbstractContextManager[object]]) -> TrainingStep:
        began = perf_counter()
        settings, number = self.settings, len(self.losses)
        batch = next(self._batches)
        num_tokens = sum(len(ids) - 1 for ids in batch)
        self.gradient.flat[:] = 0
        loss = 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # looked at below
            for index, part in enumerate(micro_batches(batch, settings.micro_tokens)):
                dropout, packed = Dropout(settings.dropout, [settings.seed, number, index]), PackedBatch.of(part)
                share = 1 / num_tokens
                loss += loss_and_gradient(self.weights, self.gradient, packed, self.activations, dropout, share)
            length = clip(self.gradient.flat, settings.clip)
        if not math.isfinite(loss + length):
            raise ValueError(
                f"step {number + 1} has a loss of {loss} and a gradient of length {length}: the weights grew too "
                f"large; learning_rate is {settings.learning_rate}, and a lower one is needed"
            )
        rate = learning_rate(number, settings.num_steps, settings.warmup, settings.learning_rate)
        with whole():
            for optimizer in self.optimizers:
                optimizer.step(rate, number + 1)
            self.losses.append(loss)
        return TrainingStep(number + 1, loss, length, num_tokens, perf_counter() - began)

    def state(self, run: dict[str, Any]) -> State:
        """All that is needed to continue, and `run`, which says what determines the weights.

        Raises ValueError where a number is NaN or inf: nothing could continue from there.
        """
        arrays = {name: to_host(array).copy() for name, array in self._arrays().items()}
        for name, array in arrays.items():
            require_numbers(name, array)
        return State(run, len(self.losses), arrays | {"losses": np.array(self.losses)})

    def restore(self, state: State) -> None:
        """Continue from `state`. Raises ValueError, and changes nothing, for the state of another run."""
        arrays = self._arrays()
        wanted = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        wanted["losses"] = (np.dtype(np.float64), (state.step,))
        if missing := sorted(wanted.keys() ^ state.arrays.keys()):
            raise ValueError(f"the state has the arrays {', '.join(sorted(state.arrays))}; {missing[0]} is one too "
                             "many, or missing")  # fmt: skip
        for name, (dtype, shape) in wanted.items():
            found = state.arrays[name]
            if (found.dtype, found.shape) != (dtype, shape):
                raise ValueError(f"the state after step {state.step} has {name} in {found.dtype} and of shape "
                                 f"{list(found.shape)}; {dtype} and {list(shape)} are needed")  # fmt: skip
        for name, array in arrays.items():
            array[...] = xp.asarray(state.arrays[name])
        self.losses = state.arrays["losses"].tolist()
        settings, context = self.settings, self.weights.config.max_position_embeddings
        every = batches(self._stories, context, settings.batch_tokens, settings.seed)
        self._batches = islice(every, state.step, None)

    def _arrays(self) -> dict[str, Array]:
        """All that changes from step to step."""
        kept = [array for optimizer in self.optimizers for array in optimizer.state]
        return {"weights": self.weights.flat, **{f"optimizer.{index}": array for index, array in enumerate(kept)}}


def _optimizers(settings: Settings, weights: Parameters, gradient: Parameters) -> list[Optimizer]:
    """The optimizer of each part of the weights. The norms' weights do not decay."""
    decay, ends = settings.weight_decay, weights.num_in_matrices
    norms = AdamW(weights.flat[ends:], gradient.flat[ends:], 0.0)
    if settings.optimizer == "adamw":
        return [AdamW(weights.flat[:ends], gradient.flat[:ends], decay), norms]
    embedding = AdamW(weights.embedding.reshape(-1), gradient.embedding.reshape(-1), decay)
    matrices, gradients = (
        [view for name, view in part.by_name().items() if "_proj" in name] for part in (weights, gradient)
    )
    return [Muon(matrices, gradients, decay), embedding, norms]


def micro_batches(batch: Sequence[np.ndarray], micro_tokens: int) -> list[list[np.ndarray]]:
    """The sequences of a batch in their order, in groups of at most `micro_tokens`, at least one in each."""
    groups: list[list[np.ndarray]] = []
    filled = micro_tokens
    for ids in batch:
        filled += len(ids) - 1
        if filled > micro_tokens:
            groups.append([])
            filled = len(ids) - 1
        groups[-1].append(ids)
    return groups


def bits_per_byte(weights: Parameters, tokenizer: Tokenizer, stories: Sequence[str]) -> float:
    """The bits that the model takes for each byte of the stories.

    Each story has an END before it; the bits are those of its tokens and of the END behind it. Comparable between
    vocabularies. In a story that is longer than the context, the context begins anew whenever it is full. Raises
    ValueError where the loss is no number.
    """
    context = weights.config.max_position_embeddings
    parts: list[np.ndarray] = []
    for ids in encode(tokenizer, stories):
        whole = np.concatenate([ids[-1:], ids])  # [length + 1]
        parts += [whole[first : first + context + 1] for first in range(0, len(whole) - 1, context)]
    groups = micro_batches(parts, max(context, 2048))
    with np.errstate(over="ignore", invalid="ignore"):  # looked at below
        nats = sum(total_loss(weights, PackedBatch.of(group)) for group in groups)
    if not math.isfinite(nats):
        raise ValueError(f"the stories have a loss of {nats}: the weights of the model hold NaN, or are too large")
    return nats / math.log(2) / sum(len(story.encode()) for story in stories)
