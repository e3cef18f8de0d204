"""What the engine gives back: requests, tokens as they come, and a record of each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..memory.manager import Snapshot, Transfer

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class SequenceOutput:
    """One sample of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # None: still running
    score: float | None = None  # of beam search: log-probability / length ** length_penalty


@dataclass(slots=True)
class RequestOutput:
    """A request and what it has generated so far. Times are seconds of time.perf_counter()."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[SequenceOutput]
    arrival: float
    first_token: float | None = None
    finished: float | None = None
    num_preemptions: int = 0
    error: Exception | None = None  # what a hook raised; the request ended there


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One new token, as stream() yields it. `text` lags while a character or a stop string is incomplete.

    Beam search yields each of its results as a whole when it ends, with the last token's id.
    """

    request_id: int
    index: int  # of the sample
    token_id: int
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did, for whoever watches (`LLM(on_step=...)`)."""

    chunks: list[tuple[int, int]]  # (seq_id, tokens computed)
    num_preempted: int
    transfers: list[Transfer]
    num_running: int
    num_waiting: int
    snapshot: Snapshot
    seconds: float
