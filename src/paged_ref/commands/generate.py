"""`paged-ref generate`: continue prompts with a model, and show each token when it is sampled."""

from __future__ import annotations

import argparse
import sys

from ..extras.sampling_params import SamplingParams
from ..llm import LLM
from ..views.common import options
from ..views.common.files import recording

MOST_INPUT = 1 << 24  # bytes: more than any context holds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.model(parser)
    prompt = "may be given several times; -: the text of standard input"
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help=prompt)
    options.integer(parser, "--max-tokens", 100, "new tokens at most", least=None)
    options.number(parser, "--temperature", 0.0, "0 is greedy (default)", metavar="T")
    options.integer(parser, "--top-k", help="draw among the K likeliest tokens", least=None, metavar="K")
    options.number(parser, "--top-p", help="draw among the likeliest that reach P together", metavar="P")
    options.seed(parser, None, "the same seed draws the same tokens")
    options.integer(parser, "--n", 1, "samples of each prompt", least=None)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="text that ends the output")
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")
    options.integer(parser, "--beam-width", help="beam search, and the K best results", least=None, metavar="K")
    options.number(parser, "--length-penalty", 1.0, "of beam search", metavar="P")
    memory = parser.add_argument_group("memory")
    options.manager(memory)
    options.block_size(memory)
    options.kv_tokens(memory, help="KV budget in tokens (default 4096)")
    options.integer(memory, "--host-kv-tokens", help="host pool for swapping", least=None)
    memory.add_argument(
        "--preemption", choices=("recompute", "swap"), help="default: recompute; swapping manager: swap"
    )
    memory.add_argument("--prefix-cache", action="store_true", help="keep the blocks of prompts for equal beginnings")
    memory.add_argument("--sanitize", action="store_true", help="check every read of the KV cache")
    options.record_output(memory)
    options.backend(parser)


def main(args: argparse.Namespace) -> int:
    options.check_text("--prompt", args.prompt)
    options.check_text("--stop", args.stop)
    prompts = [_standard_input() if prompt == "-" else prompt for prompt in args.prompt]
    params = SamplingParams(
        max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
        n=args.n, stop=tuple(args.stop), ignore_eos=args.ignore_eos, beam_width=args.beam_width,
        length_penalty=args.length_penalty,
    )  # fmt: skip
    with recording(args.record) as log:
        llm = LLM(
            args.model, manager=args.manager, block_size=args.block_size, kv_cache_tokens=args.kv_tokens,
            host_kv_tokens=args.host_kv_tokens, preemption=args.preemption, prefix_cache=args.prefix_cache,
            backend=args.backend, sanitize=args.sanitize, log=log,
        )  # fmt: skip
        _show_in_turn(llm, prompts, params)
    if params.n > 1 and params.temperature == 0:
        print(f"--n is {params.n}, and at --temperature 0 all samples are the same", file=sys.stderr)
    return 0


def _standard_input() -> str:
    """Its text, without the line break at the end that `echo` writes."""
    data = sys.stdin.buffer.read(MOST_INPUT + 1)
    if len(data) > MOST_INPUT:
        raise ValueError(f"--prompt - has more than {MOST_INPUT:,} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt - is no text: byte {error.start} of standard input is not UTF-8") from None
    return text.removesuffix("\n").removesuffix("\r")


def _show_in_turn(llm: LLM, prompts: list[str], params: SamplingParams) -> None:
    """All samples run in one batch. The text of the first that is not finished streams; the others' text is kept."""
    samples = params.beam_width or params.n
    tokens = llm.stream(prompts, params)
    turns = [(request, sample) for request in range(len(prompts)) for sample in range(samples)]
    pending = {turn: "" for turn in turns}
    finished: set[tuple[int, int]] = set()
    for request, sample in turns:
        if len(turns) > 1:
            print(f"--- prompt {request + 1}, sample {sample + 1}" if samples > 1 else f"--- prompt {request + 1}")
        print(prompts[request] + pending[request, sample], end="", flush=True)
        while (request, sample) not in finished:
            token = next(tokens)
            turn = (token.request_id, token.index)  # a new engine counts requests from 0
            if turn == (request, sample):
                print(token.text, end="", flush=True)
            else:
                pending[turn] += token.text
            if token.finish_reason is not None:
                finished.add(turn)
        print()
