"""Tokens as they come: `stream`, and `generate` with a callback. Several loops over one LLM may be open together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, Never

from ..core.engine.llm import LLM
from ..core.engine.outputs import RequestOutput, TokenOutput
from ..core.engine.request import Request
from ..core.engine.sampling import SamplingParams
from .arguments import refuse_unknown, shown
from .prompts import Given, read_prompt, read_prompts
from .transaction import Turns

# Of vLLM's words for what generate and chat take.
INSTEAD = {"sampling_params": "give params", "use_tqdm": "give on_token", "messages": "call chat"}
Params = SamplingParams | Sequence[SamplingParams] | None


class StreamingLLM(LLM):
    """The core's LLM, whose loops get their tokens whichever loop makes the step."""

    def open(self, *parts: Any) -> None:
        super().open(*parts)
        self._turns = Turns()
        self.around_step: Callable[[], AbstractContextManager[object]] = nullcontext  # what a step runs in
        self._loops: dict[int, deque[TokenOutput]] = {}  # by request_id: tokens for the loop that waits for them

    def add_request(self, prompt: Given, params: SamplingParams | None = None) -> int:
        if params is not None and not isinstance(params, SamplingParams):
            raise ValueError(f"params is {shown(params)}; SamplingParams are needed")
        ids = []
        try:
            with self._turns.taken("add_request"):
                ids.append(self._next_request_id)
                request_id = super().add_request(read_prompt(prompt), params)
                if isinstance(prompt, Mapping):  # whose text may stand beside its token ids
                    self.output_of(request_id).prompt = prompt.get("prompt")
                return request_id
        except BaseException:
            for request_id in ids:
                self.abort(request_id)
            raise

    def queue(self, prompts: Given | Sequence[Given], params: Params) -> list[Request]:
        return super().queue(read_prompts(prompts), params)

    def step(self) -> list[TokenOutput]:
        """One step for every sequence that runs; [] when nothing is left."""
        with self._turns.taken("step"), self.around_step():
            return self.engine.step()

    @property
    def has_unfinished(self) -> bool:
        return bool(self.engine.requests)

    def output_of(self, request_id: int) -> RequestOutput:
        """The output of an unfinished request. The object is filled as the request goes on."""
        return self.engine.requests[request_id].output

    def abort(self, request_id: int) -> None:
        """Stop a request where it is and free its memory. A request that has finished is left alone."""
        with self._turns.taken("abort"):
            self.engine.abort(request_id)

    def generate(
        self,
        prompts: Given | Sequence[Given],
        params: Params = None,
        *,
        on_token: Callable[[TokenOutput], None] | None = None,
        **unknown: Never,
    ) -> list[RequestOutput]:
        """Run the prompts to their end; one RequestOutput for each, in order.

        `params` is one for all, or one for each. `on_token` is called with each new token. If it or a hook raises,
        these requests are aborted and nothing stays behind.
        """
        refuse_unknown("generate", unknown, ("prompts", "params", "on_token"), INSTEAD)
        requests = self.queue(prompts, params)
        try:
            with closing(self._run(requests)) as tokens:
                next(tokens)
                for token in tokens:
                    if on_token is not None:
                        on_token(token)
        finally:
            self._abort_all(requests)
        return [request.output for request in requests]

    def stream(
        self, prompts: Given | Sequence[Given], params: Params = None, **unknown: Never
    ) -> Iterator[TokenOutput]:
        """Like generate(), but yields each token as it comes. Leaving the loop aborts what is unfinished."""
        refuse_unknown("stream", unknown, ("prompts", "params"), INSTEAD)
        requests = self.queue(prompts, params)
        try:
            tokens = self._run(requests)
            next(tokens)
        except BaseException:
            self._abort_all(requests)
            raise
        return tokens

    def _abort_all(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.output.request_id in self.engine.requests:
                self.abort(request.output.request_id)

    def __reduce__(self) -> Any:
        raise TypeError("an LLM cannot be copied or pickled: its requests belong to one KV cache; make a new LLM")

    def _run(self, requests: list[Request]) -> Generator[Any, None, None]:
        """The tokens of these requests, after one None.

        The None comes before the first step, so that the caller is inside `try` by then: dropping the loop aborts the
        requests even before their first token.
        """
        own = {request.output.request_id for request in requests}
        fresh: deque[TokenOutput] = deque()  # tokens for this loop; a step that another loop makes may bring some
        self._loops.update(dict.fromkeys(own, fresh))
        try:
            yield None
            while True:
                while fresh:
                    yield fresh.popleft()
                for request in requests:
                    if request.output.error is not None:
                        raise request.output.error
                if not any(request_id in self.engine.requests for request_id in own):
                    return
                for token in self.step():
                    if token.request_id in self._loops:
                        self._loops[token.request_id].append(token)
        finally:
            for request_id in own:
                self._loops.pop(request_id, None)
            self._abort_all(requests)
