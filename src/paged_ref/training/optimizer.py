"""AdamW on one flat array, the learning rate's way up and down, and the clip of the gradient."""

from __future__ import annotations

import math

from ..device import Array, xp

BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8


def learning_rate(step: int, num_steps: int, warmup: int, peak: float) -> float:
    """Up in a line over `warmup` steps, then down as half a cosine to 0 (Loshchilov & Hutter 2017). Step 0 is the first."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def clip(gradient: Array, longest: float) -> float:
    """Scale the gradient down to `longest`, if it is longer; returns its length before (Pascanu et al. 2013)."""
    length = float(xp.sqrt(gradient @ gradient))
    if length > longest:
        gradient *= longest / length
    return length


class AdamW:
    """Adam with weight decay apart from the gradient (Loshchilov & Hutter 2019)."""

    def __init__(self, weights: Array, num_decayed: int, weight_decay: float) -> None:
        """Of `weights [size]`, the first `num_decayed` decay."""
        self.weights, self.num_decayed, self.weight_decay = weights, num_decayed, weight_decay
        self.mean = xp.zeros_like(weights)  # [size] of the gradient, moving
        self.square = xp.zeros_like(weights)  # [size] of its square, moving
        self.count = 0  # steps made

    def step(self, gradient: Array, rate: float) -> None:
        """One step at learning rate `rate`. `gradient [size]` is left changed."""
        self.count += 1
        self.mean *= BETA1
        self.mean += (1 - BETA1) * gradient
        gradient *= gradient
        gradient *= 1 - BETA2
        self.square *= BETA2
        self.square += gradient
        self.weights[: self.num_decayed] *= 1 - rate * self.weight_decay
        size = xp.sqrt(self.square, out=gradient)  # [size]
        size *= (1 - BETA2**self.count) ** -0.5
        size += EPSILON
        xp.divide(self.mean, size, out=size)
        size *= rate / (1 - BETA1**self.count)
        self.weights -= size
