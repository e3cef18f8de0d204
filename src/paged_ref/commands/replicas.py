"""Replicas: engines in processes of their own that share nothing but the queue of prompts (data parallel).

A replica takes a prompt before each of its steps, so the one that is ahead takes more.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ..core.engine.outputs import RequestOutput
from ..distributed.group import GroupError
from ..extras.sampling_params import SamplingParams
from ..llm import LLM
from ..tuned.threads import share_cores

Served = dict[int, RequestOutput]  # by the place of the prompt
_shared: tuple[Any, ...] = ()  # in a replica: its queue and barrier


def run_replicas(
    number: int, options: dict[str, Any], prompts: Sequence[str], params: SamplingParams
) -> tuple[list[RequestOutput], list[int]]:
    """The outputs of the prompts, in order, and how many of them each of `number` replicas has made.

    `options` are those of LLM. Raises what a replica raises, and GroupError where one has ended; then the others are
    ended, too.
    """
    share_cores(number)
    context = multiprocessing.get_context("spawn")
    queue, ready = context.Queue(), context.Barrier(number)
    for item in [*enumerate(prompts), *[None] * number]:  # the None after the prompts is the end, for one replica
        queue.put(item)
    pool = ProcessPoolExecutor(number, context, _begin, (queue, ready))
    try:
        futures = [pool.submit(_serve, options, params) for _ in range(number)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):  # another replica has failed
                raise error
        served: list[Served] = [future.result() for future in futures]
    except BrokenProcessPool:
        raise GroupError("a replica has ended in the middle of the run") from None
    finally:
        queue.cancel_join_thread()
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown()
    outputs: Served = {place: output for each in served for place, output in each.items()}
    return [outputs[place] for place in range(len(prompts))], [len(each) for each in served]


def _begin(*shared: Any) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for the outputs


def _serve(options: dict[str, Any], params: SamplingParams) -> Served:
    """Be a replica until the queue is at its end."""
    queue, ready = _shared
    try:
        llm = LLM(**options)
    except BaseException:
        ready.abort()
        raise
    ready.wait()  # for all models: a replica that is there early would take all prompts
    served: Served = {}
    more = True
    while more or llm.has_unfinished:
        item = queue.get() if more else None
        if item is None:
            more = False
        else:
            request_id = llm.add_request(item[1], params)
            served[item[0]] = llm.output_of(request_id)
        if llm.has_unfinished:
            llm.step()
    return served
