"""From a directory to a config, weights and a tokenizer: a plain Llama in Hugging Face form.

The files are taken as right. What checkpoints from elsewhere need (shards, bfloat16, other architectures, checks) is in
another room, and gives the same `Checkpoint`. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import load_file

from .config import ModelConfig
from .tokenizer import Tokenizer

TINY = Path(__file__).parent / "tiny"  # the embedded checkpoint


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a directory holds."""

    config: ModelConfig
    weights: Mapping[str, np.ndarray]  # under Hugging Face's names, [out, in]
    tokenizer: Tokenizer


def load(directory: str | Path = "tiny") -> Checkpoint:
    """Read config.json, model.safetensors and tokenizer.json; "tiny" is the embedded checkpoint."""
    directory = TINY if directory == "tiny" else Path(directory)
    hf = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config = ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_size=hf["head_dim"],
        max_position_embeddings=hf["max_position_embeddings"],
        rms_norm_eps=hf["rms_norm_eps"],
        rope_theta=hf["rope_theta"],
        tie_word_embeddings=hf["tie_word_embeddings"],
        bos_token_id=hf["bos_token_id"],
        eos_token_ids=(hf["eos_token_id"],),
    )
    weights = load_file(directory / "model.safetensors")
    return Checkpoint(config, weights, Tokenizer(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))))
