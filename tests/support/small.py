"""A model small enough that every test of it takes milliseconds."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from paged_ref.core.device import xp
from paged_ref.interop.hf_config import HFConfig
from paged_ref.training.network import PackedBatch
from paged_ref.training.parameters import Parameters

LENGTHS = (9, 9, 4, 1, 13)  # of a batch's sequences: two alike, one alone, one with a single token to predict


def config(**changes: Any) -> HFConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 23,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 6,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_ids": (0,),
        "bos_token_id": 0,
    }
    return HFConfig(**sizes | changes)


def weights(config: HFConfig, dtype: DTypeLike = np.float32, seed: int = 0) -> Parameters:
    """Large enough that every part of the model moves the loss."""
    made = Parameters(config, dtype)
    rng = np.random.default_rng(seed)
    made.flat[:] = xp.asarray(0.3 * rng.standard_normal(made.flat.size))
    made.flat[made.num_in_matrices :] += 1
    return made


def batch(config: HFConfig, seed: int = 1) -> PackedBatch:
    rng = np.random.default_rng(seed)
    return PackedBatch.of([rng.integers(config.vocab_size, size=length + 1) for length in LENGTHS])
