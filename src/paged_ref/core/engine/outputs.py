"""What the engine gives back: requests, and tokens as they come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class SequenceOutput:
    """One sample of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # None: still running
    score: float | None = None  # of a search over sequences; None: the tokens were drawn one by one
    stop_reason: int | str | None = None  # the stop token or the stop text that ended it; None: EOS, or no stop
    logprobs: list[Any] | None = None  # for each token, if asked for (extras/logprobs.py)
    cumulative_logprob: float | None = None  # of all tokens, if asked for


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
    prompt_logprobs: list[Any] | None = None  # for each token of the prompt, if asked for
    error: BaseException | None = None  # what a hook raised; the request ended there


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One new token, as stream() yields it. `text` lags while a character or a stop string is incomplete."""

    request_id: int
    index: int  # of the sample
    token_id: int
    text: str
    finish_reason: FinishReason | None
    logprobs: Any = None  # if asked for: its entry of SequenceOutput.logprobs
