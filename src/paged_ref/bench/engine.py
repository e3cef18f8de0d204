"""`paged-ref bench engine`: tokens per second of this engine, and of transformers with the same weights.

A 15-million-parameter Llama with random weights, one batch of equal prompts, greedy, no end of sequence:
the work is the same for all. The runs take turns, and the medians are compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ..core.device import describe
from ..core.engine.sampling import SamplingParams
from ..core.model.config import ModelConfig
from ..core.model.loading import TINY, random_weights
from ..llm import LLM

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences at once (default 8)")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="default 32")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="times that each takes its turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")


def main(args: argparse.Namespace) -> int:
    for name in ("batch", "prompt_tokens", "new_tokens", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}; at least 1 is needed")
    console = Console()
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, HF_CONFIG["vocab_size"], size=(args.batch, args.prompt_tokens)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        _save_model(Path(folder))
        runs = {
            "paged": _ours(folder, "paged", prompts, args),
            "standard": _ours(folder, "standard", prompts, args),
        }
        if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
            runs["transformers generate"] = _transformers(folder, prompts, args)
        outputs = {name: run() for name, run in runs.items()}  # compiles and warms up
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                began = perf_counter()
                run()
                seconds[name].append(perf_counter() - began)

    new_tokens = args.batch * args.new_tokens
    baseline = list(runs)[-1]
    title = f"Batch {args.batch}, {args.prompt_tokens} + {args.new_tokens} tokens, {describe()}"
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for column in ("", "tokens per second", f"times {baseline}", "same tokens"):
        table.add_column(column, justify="left" if not column else "right")
    results: list[dict[str, Any]] = []
    for name, times in seconds.items():
        rate, ratio = new_tokens / median(times), median(seconds[baseline]) / median(times)
        same = sum(a == b for a, b in zip(outputs[name], outputs["paged"], strict=True))
        table.add_row(name, f"{rate:.0f}", f"{ratio:.2f}", f"{same}/{args.batch}")
        results.append({"name": name, "tokens_per_second": rate, f"times_{baseline}": ratio, "same_sequences": same})
    console.print(table)
    if baseline != "transformers generate":
        console.print("transformers is not installed: pip install 'paged_ref[compare]' adds it to the comparison.")
    if args.json:
        args.json.write_text(json.dumps({"device": describe(), "results": results}, indent=1) + "\n", encoding="utf-8")
    return 0


def _save_model(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(random_weights(ModelConfig.from_hf(HF_CONFIG)), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(HF_CONFIG), encoding="utf-8")
    shutil.copy(TINY / "tokenizer.json", folder)  # prompts are token ids, so any tokenizer will do


def _ours(
    folder: str, manager: Any, prompts: list[list[int]], args: argparse.Namespace
) -> Callable[[], list[list[int]]]:
    length = args.prompt_tokens + args.new_tokens
    llm = LLM(folder, manager=manager, max_model_len=length, kv_cache_tokens=args.batch * (length + 16))
    params = SamplingParams(max_tokens=args.new_tokens, ignore_eos=True)
    return lambda: [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def _transformers(folder: str, prompts: list[list[int]], args: argparse.Namespace) -> Callable[[], list[list[int]]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    batch = torch.tensor(prompts)

    def run() -> list[list[int]]:
        with torch.inference_mode():
            tokens = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        new: list[list[int]] = tokens[:, batch.shape[1] :].tolist()
        return new

    return run
