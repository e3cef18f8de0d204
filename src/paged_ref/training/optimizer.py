"""AdamW and Muon, the schedule of the learning rate, and the clip of the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from ..core.device import Array, xp

BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8  # of AdamW
MOMENTUM = 0.95  # of Muon
MUON_RATE = 7  # times the learning rate: a matrix moves equally in all directions, so its steps can be longer


def learning_rate(step: int, num_steps: int, warmup: int, peak: float) -> float:
    """A rise in a line over `warmup` steps, then half a cosine down to 0 (Loshchilov & Hutter 2017).

    Step 0 is the first.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def clip(gradient: Array, longest: float) -> float:
    """Scale the gradient down to `longest`, if it is longer; returns its length before (Pascanu et al. 2013)."""
    length = float(xp.sqrt(gradient @ gradient))
    if length > longest:
        gradient *= longest / length
    return length


class Optimizer(Protocol):
    """The rule by which some of the weights move."""

    state: list[Array]  # all that lasts from step to step

    def step(self, rate: float, count: int) -> None:
        """Make step number `count`, from 1, at learning rate `rate`. Changes the gradient."""


class AdamW:
    """Adam with weight decay apart from the gradient (Loshchilov & Hutter 2019), on flat arrays [size]."""

    def __init__(self, weights: Array, gradient: Array, weight_decay: float) -> None:
        self.weights, self.gradient, self.weight_decay = weights, gradient, weight_decay
        self.mean = xp.zeros_like(weights)  # [size] moving average of the gradient
        self.square = xp.zeros_like(weights)  # [size] moving average of its square
        self.state = [self.mean, self.square]

    def step(self, rate: float, count: int) -> None:
        gradient = self.gradient
        self.mean *= BETA1
        self.mean += (1 - BETA1) * gradient
        gradient *= gradient
        gradient *= 1 - BETA2
        self.square *= BETA2
        self.square += gradient
        self.weights *= 1 - rate * self.weight_decay
        size = xp.sqrt(self.square, out=gradient)  # [size]
        size *= (1 - BETA2**count) ** -0.5
        size += EPSILON
        xp.divide(self.mean, size, out=size)
        size *= rate / (1 - BETA1**count)
        self.weights -= size


class Muon:
    """Momentum whose matrix is made orthogonal before the weights move by it (Jordan 2024): matrices only."""

    def __init__(self, weights: Sequence[Array], gradients: Sequence[Array], weight_decay: float) -> None:
        """Matrices `[out, in]`; where several are joined in one array, views of it."""
        self.weights, self.gradients, self.weight_decay = weights, gradients, weight_decay
        self.state = [xp.zeros_like(weight) for weight in weights]

    def step(self, rate: float, count: int) -> None:
        rate *= MUON_RATE
        for weight, gradient, momentum in zip(self.weights, self.gradients, self.state, strict=True):
            momentum *= MOMENTUM
            momentum += (1 - MOMENTUM) * gradient
            gradient *= 1 - MOMENTUM
            gradient += MOMENTUM * momentum  # Nesterov momentum
            move = orthogonal(gradient)  # [out, in]
            move *= rate * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
            weight *= 1 - rate * self.weight_decay
            weight -= move


def orthogonal(matrix: Array) -> Array:
    """Nearly U Vᵀ of its singular value decomposition: five steps of Newton and Schulz with Jordan's numbers.

    They bring every singular value into about 0.7 to 1.2, by products of matrices only.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # [less, more]
    x = x / (xp.sqrt((x * x).sum()) + 1e-7)
    for _ in range(5):
        square = x @ x.T  # [less, less]
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
