"""The same checkpoints in transformers, an implementation by others. Needs the extra `compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from support.stepping import logits_of
from tokenizers import models

from paged_ref import LLM, SamplingParams
from paged_ref.interop.architectures import attention_variants, build_model
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
FIRST = 10  # tokens of the context before RoPE is scaled: shorter than two of the sequences
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.0, 4.0, 8.0]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": FIRST}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 40, "sliding_window": 7}
GPT2 = {"n_positions": 64, "n_embd": 48, "n_layer": 4, "n_head": 6}
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
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3-biases": ("Qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-no-caps": (
        "Gemma2",
        GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    "gemma3": ("Gemma3Text", GEMMA | {"sliding_window_pattern": 3, "final_logit_softcapping": 4.0}),
    "gemma3-rope": (
        "Gemma3Text",
        GEMMA
        | {
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "phi3-longrope": (
        "Phi3",
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": FIRST, "tie_word_embeddings": True},
    ),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "olmo2-tied": ("Olmo2", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", GPT2 | {"n_inner": 72, "tie_word_embeddings": False}),
    "rope-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "rope-dynamic": (
        "Llama",
        {"max_position_embeddings": FIRST, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "rope-yarn": ("Qwen2", {"rope_theta": 100.0, "rope_scaling": YARN}),
    "rope-yarn-mscale": (
        "Llama",
        {
            "head_dim": 32,
            "rope_theta": 1000.0,
            "rope_scaling": YARN
            | {"beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False},
        },
    ),
    "rope-longrope": ("Llama", {"rope_scaling": LONGROPE | {"original_max_position_embeddings": FIRST, "factor": 4.0}}),
}
SEQUENCES = [[int(t) for t in np.random.default_rng(n).integers(96, size=n)] for n in (40, 1, 23)]


def build(name: str) -> Any:
    """A transformers model with random weights, biases and norms included."""
    family, keys = CASES[name]
    torch.manual_seed(7)
    sizes = SIZES if family != "GPT2" else {key: SIZES[key] for key in ("vocab_size", "initializer_range")}
    config = getattr(transformers, f"{family}Config")(**sizes | keys)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
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


def logits_of_transformers(model: Any, tokens: list[int], chunk: int) -> np.ndarray:
    """[len(tokens), vocab_size], fed `chunk` tokens at a time."""
    cache, parts = transformers.DynamicCache(config=model.config), []
    with torch.no_grad():
        for begin in range(0, len(tokens), chunk):
            parts.append(model(torch.tensor([tokens[begin : begin + chunk]]), cache=cache).logits[0].numpy())
    return np.concatenate(parts)


def assert_agrees(model: Any, directory: Path, **how: Any) -> None:
    checkpoint = load(directory)
    rope = getattr(model.config, "rope_parameters", None) or {}
    # transformers takes longrope's short divisors for short sequences, and the core's Llama the long ones for all
    sequences = [s for s in SEQUENCES if rope.get("rope_type") != "longrope" or len(s) > FIRST]
    variants = attention_variants(checkpoint.config)
    answers = logits_of(build_model(checkpoint.config, checkpoint.weights), sequences, variants=variants, **how)
    for tokens, logits in zip(sequences, answers, strict=True):
        want = logits_of_transformers(model, tokens, 1 if rope.get("rope_type") == "dynamic" else len(tokens))
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


def without_repeats(tokens: Sequence[int], row: np.ndarray) -> np.ndarray:
    row = np.array(row)
    row[list(tokens)] = -np.inf
    return row


@pytest.mark.parametrize("manager", ["paged", "standard", "swapping"])
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_agree(name: str, manager: Any, tmp_path: Path) -> None:
    """Prompts in chunks, then decode steps: past the window, and past the first context of a scaled RoPE.

    No token may come twice, since small models with random weights repeat one for ever.
    """
    model = build(name)
    save(model, tmp_path)
    prompts = (
        [SEQUENCES[0][:25], SEQUENCES[2][: FIRST + 1]] if "longrope" in name else [SEQUENCES[0][:FIRST], [5, 6, 7]]
    )
    llm = LLM(tmp_path, manager=manager, max_batch_tokens=6, kv_cache_tokens=160, max_model_len=40)
    params = SamplingParams(max_tokens=14, temperature=0, ignore_eos=True, logits_hook=without_repeats)
    outputs = llm.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            want = model.generate(
                torch.tensor([prompt]), max_new_tokens=14, min_new_tokens=14, do_sample=False, pad_token_id=0,
                eos_token_id=None,
                logits_processor=[lambda ids, scores: scores.index_fill(1, ids[0], -float("inf"))],
            )[0, len(prompt) :].tolist()  # fmt: skip
        assert output.outputs[0].token_ids == want


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2"])
def test_half_precision_files_are_read_exactly(name: str, dtype: str, tmp_path: Path) -> None:
    model = cast_weights(build(name), dtype)
    save(model, tmp_path)
    assert_agrees(cast_weights(model, "float32"), tmp_path)


@pytest.mark.parametrize(("name", "dtype"), [("llama", "bfloat16"), ("llama", "float32"), ("gpt2", "float32")])
def test_shards_are_joined(name: str, dtype: str, tmp_path: Path) -> None:
    model = cast_weights(build(name), dtype)
    save(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_agrees(cast_weights(model, "float32"), tmp_path)


def test_a_mistral_without_the_key_has_the_window_of_transformers(tmp_path: Path) -> None:
    config = {key: value for key, value in SIZES.items() if key != "initializer_range"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", **config}), encoding="utf-8")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read_config(tmp_path).sliding_windows == (theirs.sliding_window,) * 4 == (4096,) * 4
