"""What a model is in numbers: sizes that cannot be, and the bytes of a token."""

from __future__ import annotations

import re
from typing import Any

import pytest

from paged_ref.core.model.config import ModelConfig, kv_bytes_per_token

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_size": 8,
    "max_position_embeddings": 512,
}


def test_without_windows_every_layer_sees_everything() -> None:
    assert ModelConfig(**SIZES).sliding_windows == (None,) * 4
    assert ModelConfig(**SIZES, sliding_windows=(None, 4, 1, None)).sliding_windows == (None, 4, 1, None)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_at_least_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is 0; at least 1 is needed"):
        ModelConfig(**{**SIZES, name: 0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads is 8; a multiple of the 3 KV heads is needed"),
        ({"head_size": 7}, "head_size is 7; RoPE turns pairs, so an even number is needed"),
        ({"sliding_windows": (None,)}, "sliding_windows has length 1; num_layers is 4"),
        ({"sliding_windows": (4, 0, None, 4)}, "sliding_windows holds 0; at least 1 is needed (the token itself)"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**{**SIZES, **fields})


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), ("float32", 4)])
def test_kv_bytes_per_token(dtype: str, size: int) -> None:
    assert kv_bytes_per_token(ModelConfig(**SIZES), dtype) == 2 * 4 * 2 * 8 * size
