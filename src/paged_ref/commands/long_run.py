"""One run of `paged-ref long` over the text: what it computes, how long it takes, and how much attention it covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter

import numpy as np

from ..beyond_device.kv import Counters, StreamedKV
from ..beyond_device.observation import Observation
from ..core.memory.kv import KVCache
from ..extras.sampling_params import SamplingParams
from ..llm import LLM

OBSERVED = 8  # further tokens at the end of each run, for which the true attention is computed: these are not timed


@dataclass
class LongRun:
    """One way to run over the text, and what is measured."""

    name: str
    llm: LLM
    rows: list[np.ndarray] = field(default_factory=list)  # logits: after the text, after each token of the exact run
    times: list[float] = field(default_factory=list)
    covered: list[float] = field(default_factory=list)  # shares of attention mass
    counters: Counters = field(default_factory=Counters)  # of the timed tokens
    device_bytes: int = 0

    def go(self, ids: Sequence[int], new_tokens: int, exact: LongRun | None = None) -> None:
        """Continue the text greedily; with `exact`, by the tokens of that run, so that both answer the same inputs."""
        kv = self.llm.engine.kv

        def hook(tokens: Sequence[int], logits: np.ndarray) -> np.ndarray:
            self.times.append(perf_counter())
            n = len(self.rows)
            self.rows.append(logits.copy())
            if isinstance(kv, StreamedKV):
                if n == 0:
                    kv.counters = Counters()  # the text is read; now the new tokens count
                elif n == new_tokens:
                    self.counters = replace(kv.counters)  # a copy: the observed tokens count on
                    self.device_bytes = kv.device_bytes
                    kv.observe = self._observe
            if exact is not None:
                likeliest = exact.rows[n].argmax()
                logits[:likeliest] = logits[likeliest + 1 :] = -np.inf
            return logits

        params = SamplingParams(max_tokens=new_tokens + OBSERVED, ignore_eos=True, logits_hook=hook)
        self.llm.generate([list(ids)], params)
        if isinstance(kv, KVCache):
            self.device_bytes = int(kv.device.nbytes)
        del self.times[new_tokens + 1 :]

    def _observe(self, seen: Observation) -> None:
        for mass, blocks in zip(seen.mass, seen.chosen, strict=True):
            self.covered.append(float(mass[:, blocks].sum(axis=-1).mean()))

    @property
    def seconds(self) -> float:
        """Of one token, median."""
        return median(np.diff(self.times).tolist())

    def agreement(self, exact: LongRun) -> tuple[float, float]:
        """The share of rows in which the same token is the likeliest, and the largest difference of a logit."""
        mine, wanted = np.array(self.rows), np.array(exact.rows)
        return float(np.mean(mine.argmax(axis=1) == wanted.argmax(axis=1))), float(np.abs(mine - wanted).max())
