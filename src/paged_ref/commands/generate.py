"""`paged-ref generate`: continue prompts with a model, and show the text as it comes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..core.engine.sampling import SamplingParams
from ..extras.managers import MANAGERS
from ..llm import LLM
from ..timeline.events import write_events
from .recording import record_to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", metavar="DIR", help="Hugging Face directory (default: embedded)")
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    parser.add_argument("--max-tokens", type=int, default=100, metavar="N", help="new tokens at most (default 100)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that reach P together")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same tokens")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="samples of each prompt")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="text that ends the output")
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")
    parser.add_argument("--beam-width", type=int, metavar="K", help="beam search, and the K best results")
    parser.add_argument("--length-penalty", type=float, default=1.0, metavar="P", help="of beam search (default 1)")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--manager", default="paged", choices=MANAGERS, help="default paged")
    memory.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens in a block (default 16)")
    memory.add_argument("--kv-tokens", type=int, metavar="N", help="KV budget in tokens (default 4096)")
    memory.add_argument("--host-kv-tokens", type=int, metavar="N", help="host pool for swapping")
    memory.add_argument(
        "--preemption", choices=("recompute", "swap"), help="default: recompute; swapping manager: swap"
    )
    memory.add_argument("--prefix-cache", action="store_true", help="keep blocks of prompts for those that begin alike")
    memory.add_argument("--sanitize", action="store_true", help="check every read of the KV cache")
    memory.add_argument("--record", type=Path, metavar="FILE", help="write what happens as JSON lines")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="attention backend (see paged-ref info)")


def main(args: argparse.Namespace) -> int:
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        n=args.n,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
        beam_width=args.beam_width,
        length_penalty=args.length_penalty,
    )
    with record_to(args.record) as file:
        llm = LLM(
            args.model,
            manager=args.manager,
            block_size=args.block_size,
            kv_cache_tokens=args.kv_tokens,
            host_kv_tokens=args.host_kv_tokens,
            preemption=args.preemption,
            prefix_cache=args.prefix_cache,
            backend=args.backend,
            sanitize=args.sanitize,
            log=None if file is None else lambda event: write_events([event], file),
        )
        _show_in_turn(llm, args.prompt, params)
    return 0


def _show_in_turn(llm: LLM, prompts: list[str], params: SamplingParams) -> None:
    """All run in one batch. What is on screen streams; the others' text waits for its turn."""
    samples = params.beam_width or params.n
    tokens = llm.stream(prompts, params)
    turns = [(request, sample) for request in range(len(prompts)) for sample in range(samples)]
    pending = {turn: "" for turn in turns}
    finished: set[tuple[int, int]] = set()
    for request, sample in turns:
        if len(turns) > 1:
            print(f"--- prompt {request + 1}, sample {sample + 1}" if samples > 1 else f"--- prompt {request + 1}")
        _show(prompts[request] + pending[request, sample])
        while (request, sample) not in finished:
            token = next(tokens)
            turn = (token.request_id, token.index)  # a new engine counts requests from 0
            if turn == (request, sample):
                _show(token.text)
            else:
                pending[turn] += token.text
            if token.finish_reason is not None:
                finished.add(turn)
        print()


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
