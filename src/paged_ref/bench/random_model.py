"""Model directories with random weights, for benchmarks of whole models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ..core.model.config import ModelConfig
from ..core.model.loading import TINY
from ..extras.memory_limit import require_memory
from ..interop.architectures import weight_shapes
from ..training.checkpoint import hf_config

TOKEN_BYTES = 64  # of a token id in a list: the integer, its place in the list, and NumPy's copy


def require_prompt_memory(batch: int, length: int) -> None:
    """Raise ValueError for more tokens than lists of Python integers can hold here."""
    what = f"--batch is {batch} and --prompt-tokens {length}: a batch of this size"
    require_memory(what, TOKEN_BYTES * batch * length)


def save_checkpoint(folder: Path, config: ModelConfig, weights: Mapping[str, np.ndarray]) -> None:
    """What LLM and transformers load. The prompts are token ids, so the embedded model's tokenizer does for all."""
    save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})
    dtype = next(iter(weights.values())).dtype
    (folder / "config.json").write_text(json.dumps(hf_config(config, dtype)), encoding="utf-8")
    shutil.copy(TINY / "tokenizer.json", folder)


def repeated_weights(config: ModelConfig, dtype: str) -> dict[str, np.ndarray]:
    """Random weights that keep activations near size 1. Few numbers are drawn, and repeated: a large model is quick."""
    drawn = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    return {
        name: np.ones(shape, dtype)
        if len(shape) == 1
        else np.resize((drawn / np.float32(np.sqrt(shape[1]))).astype(dtype), shape)
        for name, shape in weight_shapes(config).items()
    }
