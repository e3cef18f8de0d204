"""`paged-ref bench distributed`: ranks of one thread each against one process of as many threads.

A Llama of random parameters continues a batch of prompts, greedily: `paged-ref generate` on ranks and in one process,
which take turns. Compared is the median time of a decode step. With ranks, some of it is communication: the time in
which rank 0 waits for messages to go or come, which is also the time for which the ranks differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from ..core.model.config import ModelConfig
from ..interop.architectures import random_weights
from ..views.common import options
from ..views.common.console import Console
from ..views.common.versions import describe_device
from .random_model import save_checkpoint
from .results import median_ratio, table_of, write_results

PROMPT = "Once upon a time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.integer(parser, "--ranks", 2, "of one thread each", least=2)
    options.integer(parser, "--batch", 8, "sequences in a batch")
    options.integer(parser, "--new-tokens", 48, least=2)
    options.integer(parser, "--hidden-size", 512, "of the model: a multiple of 64 for each rank")
    options.integer(parser, "--rounds", 3, "times that each takes its turn")
    options.json_output(parser)


def main(args: argparse.Namespace) -> int:
    size = args.hidden_size
    heads = size // 64
    config = ModelConfig(
        vocab_size=2048, hidden_size=size, intermediate_size=3 * size, num_layers=8, num_heads=max(1, heads),
        num_kv_heads=max(1, heads), head_size=64, max_position_embeddings=512, eos_token_ids=(0,),
    )  # fmt: skip
    ranks, threads = f"{args.ranks} ranks, 1 thread", f"1 process, {args.ranks} threads"
    steps: dict[str, list[float]] = {ranks: [], threads: []}
    shares, said = [], {}
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), config, random_weights(config))
        for _ in range(args.rounds):
            on_ranks = _run(folder, args, 1, "--tensor-parallel", str(args.ranks))
            alone = _run(folder, args, args.ranks)
            same = [_tokens(on_ranks), _tokens(alone)]
            steps[ranks].append(median(on_ranks["steps"][1:]))
            steps[threads].append(median(alone["steps"][1:]))
            shares.append(on_ranks["seconds_in_communication"] / sum(on_ranks["steps"]))
            said = on_ranks["bytes_said"]
    equal = sum(a == b for a, b in zip(*same, strict=True))
    speed = median_ratio(steps[threads], steps[ranks])
    rows = [
        (ranks, f"{1e3 * median(steps[ranks]):.1f}", f"{speed:.2f}", f"{median(shares):.0%}", f"{equal}/{args.batch}"),
        (threads, f"{1e3 * median(steps[threads]):.1f}", "1.00", "-", ""),
    ]
    columns = ("", "ms a step", "speed", "communication", "same tokens")
    console = Console()
    console.print(table_of(columns, rows, title=f"Batch {args.batch}, hidden size {size}, {describe_device()}"))
    every = {name: number / args.new_tokens for name, number in said.items()}
    console.print("Bytes of a step: " + ", ".join(f"{number:,.0f} {name}" for name, number in every.items()))
    write_results(args.json, steps=steps, speed=speed, share_in_communication=shares, bytes_of_all_steps=said)
    return 0


def _run(folder: str, args: argparse.Namespace, threads: int, *more: str) -> dict[str, Any]:
    """What one `paged-ref generate` says of its run. Its error, if it has one, is this command's."""
    command = [sys.executable, "-m", "paged_ref", "--threads", str(threads), "generate", "--model", folder]
    command += ["--ignore-eos", "--max-tokens", str(args.new_tokens), "--json", "-", *more]
    command += ["--prompt", PROMPT] * args.batch
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().removeprefix("paged-ref: ").removeprefix("error: "))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _tokens(found: dict[str, Any]) -> list[list[int]]:
    return [output["samples"][0]["token_ids"] for output in found["outputs"]]
