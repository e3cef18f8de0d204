"""`paged-ref bench formats`: what K and V in fewer bits cost in perplexity, and what they save in blocks.

The same held-out stories are scored once for each format, as prompts: each token's probability is what the model gives
it after the tokens before, whose K and V were written and read in that format (`prompt_logprobs`). The first stories
to run are those that the scales of int8 and float8 are measured on, as in any other run.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..extras.formatted_kv import FORMATS
from ..extras.sampling_params import SamplingParams
from ..interop.model_memory import format_bytes_per_token
from ..llm import LLM
from ..training.corpus import hold_out, read_stories
from ..views.common import options
from ..views.common.console import Console
from .results import table_of, write_results

STORIES = Path(__file__).with_name("held_out.txt")  # written for this benchmark, so no model has learned from them
HELD_OUT = 0.05  # of another text: its last stories, as `paged-ref train` holds them out
BLOCK_SIZE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.model(parser)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="score its last stories (a twentieth) in place of our own four"
    )
    options.integer(parser, "--memory-mib", 16, "memory for K and V, in which blocks are counted")
    options.json_output(parser)


def main(args: argparse.Namespace) -> int:
    stories = read_stories(STORIES) if args.text is None else hold_out(read_stories(args.text), HELD_OUT)[1]
    results = [score(args.model, kv_dtype, stories, args.memory_mib << 20) for kv_dtype in ("float32", *FORMATS)]
    base = results[0]["perplexity"]
    rows = [
        (
            r["kv_dtype"], str(r["bytes_per_token"]), f"{r['blocks']:,}", f"{r['perplexity']:.4f}",
            f"{100 * (r['perplexity'] / base - 1):+.3f}%",
        )
        for r in results
    ]  # fmt: skip
    title = f"{len(stories)} stories, {results[0]['tokens']:,} tokens, model {Path(args.model).name}"
    blocks = f"blocks of {BLOCK_SIZE} in {args.memory_mib} MiB"
    Console().print(table_of(("", "bytes per token", blocks, "perplexity", "more than float32"), rows, title=title))
    write_results(args.json, results=results)
    return 0


def score(model: str, kv_dtype: str, stories: list[str], memory: int) -> dict[str, Any]:
    """The perplexity of the stories with K and V in `kv_dtype`, and the blocks that `memory` bytes hold."""
    llm = LLM(model, kv_dtype=kv_dtype, block_size=BLOCK_SIZE)
    most = llm.max_model_len - 1  # of the prompt: a token of output needs room, too
    ids = [llm.get_tokenizer().encode(story)[:most] for story in stories]
    outputs = llm.generate([each for each in ids if len(each) > 1], SamplingParams(max_tokens=1, prompt_logprobs=0))
    scored = [
        entry[token_id].logprob
        for output in outputs
        for token_id, entry in zip(output.prompt_token_ids[1:], (output.prompt_logprobs or ())[1:], strict=True)
    ]
    bytes_per_token = format_bytes_per_token(llm.config, kv_dtype)
    return {
        "kv_dtype": kv_dtype,
        "bytes_per_token": bytes_per_token,
        "blocks": memory // (bytes_per_token * BLOCK_SIZE),
        "tokens": len(scored),
        "perplexity": math.exp(-math.fsum(scored) / len(scored)),
    }
