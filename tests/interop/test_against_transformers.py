"""The same checkpoints in transformers, an implementation by others. Needs the extra `compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from support.stepping import logits_of
from tokenizers import models

from paged_ref.interop.architectures import build_model
from paged_ref.interop.checkpoints import load, read_config

torch = pytest.importorskip("torch", reason="the extra `compare` (torch, transformers) is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `compare` is not installed")

pytestmark = pytest.mark.compare

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,  # large enough that every part moves the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOW = 7  # shorter than the prompts
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 12, "num_key_value_heads": 6}),
    "llama3-rope": ("Llama", {"rope_theta": 300.0, "rope_scaling": LLAMA3_ROPE}),
    "qwen2": ("Qwen2", {}),
    "qwen2-sliding": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-sliding": (
        "Qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mistral-no-window": ("Mistral", {"sliding_window": None, "rope_theta": 1e6}),
}
SEQUENCES = [[int(t) for t in np.random.default_rng(n).integers(96, size=n)] for n in (40, 1, 23)]


def build(name: str) -> Any:
    """A transformers model with random weights, biases and norms included."""
    family, keys = CASES[name]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**SIZES | keys)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # transformers starts these at 0 and 1, where a mistake would not show
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def cast_weights(model: Any, dtype: str) -> Any:
    """Parameters only: `model.to` would round RoPE's frequencies too, which no file holds."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def save(model: Any, directory: Path, **how: Any) -> None:
    model.save_pretrained(directory, **how)
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(directory / "tokenizer.json"))


def assert_agrees(model: Any, directory: Path, **how: Any) -> None:
    checkpoint = load(directory)
    answers = logits_of(build_model(checkpoint.config, checkpoint.weights), SEQUENCES, **how)
    for tokens, logits in zip(SEQUENCES, answers, strict=True):
        with torch.no_grad():
            want = model(torch.tensor([tokens])).logits[0].numpy()
        assert np.abs(want).max() > 0.5, "logits this small would agree by accident"
        np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_logits_agree(name: str, tmp_path: Path) -> None:
    model = build(name)
    save(model, tmp_path)
    assert_agrees(model, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_by_chunks_in_the_contiguous_layout(name: str, tmp_path: Path) -> None:
    model = build(name)
    save(model, tmp_path)
    assert_agrees(model, tmp_path, chunk=6, layout="contiguous")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_half_precision_files_are_read_exactly(name: str, dtype: str, tmp_path: Path) -> None:
    model = cast_weights(build(name), dtype)
    save(model, tmp_path)
    assert_agrees(cast_weights(model, "float32"), tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_shards_are_joined(dtype: str, tmp_path: Path) -> None:
    model = cast_weights(build("llama"), dtype)
    save(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_agrees(cast_weights(model, "float32"), tmp_path)


def test_a_mistral_without_the_key_has_the_window_of_transformers(tmp_path: Path) -> None:
    config = {key: value for key, value in SIZES.items() if key != "initializer_range"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", **config}), encoding="utf-8")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read_config(tmp_path).sliding_windows == (theirs.sliding_window,) * 4 == (4096,) * 4
