"""`paged-ref generate`: continue prompts with a model, and show the text as it comes."""

from __future__ import annotations

import argparse
import sys

from ..engine.llm import LLM
from ..engine.sampling import SamplingParams


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
    parser.add_argument("--manager", default="paged", choices=("paged", "standard"), help="default paged")
    parser.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens in a block (default 16)")
    parser.add_argument("--kv-tokens", type=int, metavar="N", help="KV budget in tokens (default 4096)")
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
    )
    llm = LLM(
        args.model,
        manager=args.manager,
        block_size=args.block_size,
        kv_cache_tokens=args.kv_tokens,
        backend=args.backend,
    )
    # All run in one batch. What is on screen streams; the others' text waits for its turn.
    tokens = llm.stream(args.prompt, params)
    turns = [(request, sample) for request in range(len(args.prompt)) for sample in range(args.n)]
    pending = {turn: "" for turn in turns}
    finished: set[tuple[int, int]] = set()
    first_request: int | None = None
    for request, sample in turns:
        if len(turns) > 1:
            print(f"--- prompt {request + 1}, sample {sample + 1}" if args.n > 1 else f"--- prompt {request + 1}")
        _show(args.prompt[request])
        _show(pending[request, sample])
        while (request, sample) not in finished:
            token = next(tokens)
            if first_request is None:
                first_request = token.request_id
            turn = (token.request_id - first_request, token.index)
            if turn == (request, sample):
                _show(token.text)
            else:
                pending[turn] += token.text
            if token.finish_reason is not None:
                finished.add(turn)
        print()
    return 0


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
