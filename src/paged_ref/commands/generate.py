"""`paged-ref generate`: continue prompts with a model, and show each token when it is sampled."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from ..core.engine.outputs import RequestOutput, SequenceOutput
from ..distributed.group import Group, GroupError
from ..distributed.plan import follow
from ..distributed.split import Part
from ..extras.reading import read_text
from ..extras.sampling_params import SamplingParams
from ..extras.token_text import visible
from ..interop.checkpoints import load
from ..interop.hf_tokenizer import chat_prompts
from ..llm import LLM
from ..views.common import options
from ..views.common.files import recording, write_json
from .rank_guard import GUARDED, own_guard
from .ranks import on_rank, start, started_ranks
from .replicas import run_replicas

MOST_INPUT = 1 << 24  # bytes: more than any context holds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.model(parser)
    prompt = "may be given several times; -: the text of standard input"
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help=prompt)
    options.integer(parser, "--max-tokens", 100, "new tokens at most", least=None)
    options.number(parser, "--temperature", 0.0, "0 is greedy (default)", metavar="T")
    options.integer(parser, "--top-k", help="draw among the K likeliest tokens", least=None, metavar="K")
    options.number(parser, "--top-p", help="draw among the likeliest that reach P together", metavar="P")
    options.number(
        parser, "--min-p", 0.0, "draw among tokens with at least P of the likeliest one's probability", metavar="P"
    )
    options.seed(parser, None, "the same seed draws the same tokens")
    options.integer(parser, "--n", 1, "samples of each prompt", least=None)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="text that ends the output")
    options.integer(parser, "--min-tokens", 0, "no end before so many tokens", least=None)
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")
    options.integer(parser, "--beam-width", help="beam search, and the K best results", least=None, metavar="K")
    options.number(parser, "--length-penalty", 1.0, "of beam search", metavar="P")
    penalties = parser.add_argument_group("penalties, as in vLLM and OpenAI's API")
    options.number(penalties, "--repetition-penalty", 1.0, "above 1: fewer tokens of prompt and output", metavar="X")
    options.number(penalties, "--presence-penalty", 0.0, "taken from the logit of a token in the output", metavar="X")
    options.number(penalties, "--frequency-penalty", 0.0, "the same, each time that it is there", metavar="X")
    penalties.add_argument(
        "--bad-word", dest="bad_words", action="append", default=[], metavar="TEXT", help="text that is not generated"
    )
    options.integer(parser, "--logprobs", help="print each token's log-probability, and of the K likeliest", least=None,
                    metavar="K")  # fmt: skip
    parser.add_argument("--chat", action="store_true", help="the prompts are messages to a chat model")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    template = "with --chat: a Jinja template, in place of the checkpoint's"
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help=template)
    memory = parser.add_argument_group("memory")
    options.manager(memory)
    options.block_size(memory)
    options.kv_tokens(memory, help="KV budget in tokens (default 4096)")
    options.integer(memory, "--host-kv-tokens", help="host pool for swapping", least=None)
    memory.add_argument(
        "--preemption", choices=("recompute", "swap"), help="default: recompute; swapping manager: swap"
    )
    memory.add_argument("--prefix-cache", action="store_true", help="keep the blocks of prompts for equal beginnings")
    memory.add_argument("--kv-dtype", metavar="NAME", help="K and V in bfloat16, int8 or float8 (fp8)")
    memory.add_argument("--sanitize", action="store_true", help="check every read of the KV cache")
    options.record_output(memory)
    options.backend(parser)
    options.json_output(parser, "also write prompts and outputs here; -: print only them", stdout=True)
    workers = parser.add_argument_group("several workers (extra `distributed`)")
    options.integer(workers, "--tensor-parallel", help="ranks that share the model and one block table (MPI)")
    options.integer(workers, "--replicas", help="engines that share nothing but the queue of prompts")


def main(args: argparse.Namespace) -> int:
    options.check_text("--prompt", args.prompt)
    if args.system is not None:
        options.check_text("--system", [args.system])
    for option, value in (("--system", args.system), ("--chat-template", args.chat_template)):
        if value is not None and not args.chat:
            raise ValueError(f"{option} is {str(value)!r} without --chat; it is a part of a conversation")
    if args.replicas is not None:
        if args.replicas > len(args.prompt):
            raise ValueError(f"--replicas is {args.replicas}; each needs a prompt, and there are {len(args.prompt)}")
        for option in ("tensor_parallel", "record", "chat", "logprobs"):
            if (given := getattr(args, option)) is not None and given is not False:
                raise ValueError(f"--replicas is {args.replicas}; --{option.replace('_', '-')} does not go with it")
        return _generate(args)
    ranks = started_ranks()
    wanted = args.tensor_parallel or max(1, ranks)
    if ranks and wanted != ranks:
        raise ValueError(f"--tensor-parallel is {wanted}; mpiexec has started {ranks} ranks")
    if wanted > 1 and not ranks:
        Part(load(args.model).config, {}, 0, wanted)  # refuses a number that none of the ranks could work with
        return start(wanted, args.command_line, _standard_input().encode() if "-" in args.prompt else b"")
    if wanted > 1 and GUARDED not in os.environ:
        return own_guard(args.command_line)
    return on_rank(partial(_generate, args)) if wanted > 1 else _generate(args)


def _generate(args: argparse.Namespace, group: Group | None = None) -> int:
    """All of it, or what one rank does."""
    options_of_llm = dict(
        model=args.model, manager=args.manager, block_size=args.block_size, kv_cache_tokens=args.kv_tokens,
        host_kv_tokens=args.host_kv_tokens, preemption=args.preemption, prefix_cache=args.prefix_cache,
        kv_dtype=args.kv_dtype, backend=args.backend, sanitize=args.sanitize, group=group,
    )  # fmt: skip
    if group is not None and group.rank:
        follow(LLM(**options_of_llm).engine, group)
        return 0
    texts = [_standard_input() if prompt == "-" else prompt for prompt in args.prompt]
    params = _params(args)
    quiet = str(args.json) == "-"
    found: dict[str, Any] = {"model": args.model, "ranks": 1 if group is None else group.size}
    if args.replicas is not None:
        try:
            outputs, found["replicas"] = run_replicas(args.replicas, options_of_llm, texts, params)
        except GroupError as error:
            print(f"paged-ref: {error}", file=sys.stderr)
            return 1
        _show(outputs if not quiet else [])
    else:
        found["steps"] = []
        with recording(args.record) as log:
            llm = LLM(**options_of_llm, log=log, on_step=lambda record: found["steps"].append(record.seconds))
            prompts = _conversations(llm, texts, args.system, args.chat_template) if args.chat else texts
            outputs = llm.generate(prompts, params) if quiet else _show_in_turn(llm, texts, prompts, params)
    if group is not None:
        found |= {"bytes_said": dict(group.bytes), "seconds_in_communication": group.seconds}
    if params.n > 1 and params.temperature == 0:
        print(f"--n is {params.n}, and at --temperature 0 all samples are the same", file=sys.stderr)
    found["outputs"] = [
        {
            "prompt": output.prompt,
            "prompt_token_ids": output.prompt_token_ids,
            "num_preemptions": output.num_preemptions,
            "samples": [asdict(sample) for sample in output.outputs],
        }
        for output in outputs
    ]
    if quiet:
        print(json.dumps(found, indent=1))
    elif args.json:
        write_json(args.json, found)
    return 0


def _params(args: argparse.Namespace) -> SamplingParams:
    given = {field.name: getattr(args, field.name) for field in fields(SamplingParams) if hasattr(args, field.name)}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # which the last line of a run says
        return SamplingParams(**given)


def _show(outputs: list[RequestOutput]) -> None:
    """As _show_in_turn does, when all is there."""
    for request, output in enumerate(outputs, start=1):
        for sample in output.outputs:
            _head(request, sample.index + 1, len(outputs), len(output.outputs))
            print(f"{output.prompt}{sample.text}")
            _show_logprobs(sample)


def _head(request: int, sample: int, requests: int, samples: int) -> None:
    if requests * samples > 1:
        print(f"--- prompt {request}, sample {sample}" if samples > 1 else f"--- prompt {request}")


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


def _conversations(llm: LLM, prompts: list[str], system: str | None, template: Path | None) -> list[dict[str, Any]]:
    """A conversation for each prompt, up to where the model answers."""
    before = [] if system is None else [{"role": "system", "content": system}]
    given = None if template is None else read_text(template)
    return chat_prompts(llm.tokenizer, [[*before, {"role": "user", "content": prompt}] for prompt in prompts], given)


def _show_logprobs(output: SequenceOutput) -> None:
    """If asked for, a line for each token: its log-probability, its rank, and the likeliest other tokens."""
    for token_id, entries in zip(output.token_ids, output.logprobs or (), strict=output.logprobs is not None):
        shown = {i: f"{visible(entry.decoded_token or f'<{i}>')} {entry.logprob:.3f}" for i, entry in entries.items()}
        likeliest = sorted((entry.rank, shown[i]) for i, entry in entries.items() if i != token_id)
        others = "".join(f"   {rank}. {text}" for rank, text in likeliest)
        print(f"{shown[token_id]:<24} rank {entries[token_id].rank}{others}")


def _show_in_turn(llm: LLM, shown: list[str], prompts: Sequence[Any], params: SamplingParams) -> list[RequestOutput]:
    """All samples run in one batch. The text of the first that is not finished streams; the others' text is kept.

    `shown` is printed before the text of each prompt."""
    samples = params.beam_width or params.n
    tokens = llm.stream(prompts, params)
    outputs = [llm.output_of(request) for request in range(len(prompts))]  # a new engine counts requests from 0
    turns = [(request, sample) for request in range(len(prompts)) for sample in range(samples)]
    pending = {turn: "" for turn in turns}
    finished: set[tuple[int, int]] = set()
    for request, sample in turns:
        _head(request + 1, sample + 1, len(prompts), samples)
        end = "" if isinstance(prompts[request], str) else "\n"  # of the message, before the model's answer
        print(f"{shown[request]}{end}{pending[request, sample]}", end="", flush=True)
        while (request, sample) not in finished:
            token = next(tokens)
            turn = (token.request_id, token.index)
            if turn == (request, sample):
                print(token.text, end="", flush=True)
            else:
                pending[turn] += token.text
            if token.finish_reason is not None:
                finished.add(turn)
        print()
        _show_logprobs(outputs[request].outputs[sample])
    return outputs
