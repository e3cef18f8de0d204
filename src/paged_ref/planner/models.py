"""Known models in numbers, so that a model can be weighed without its weights.

A name of the table, or a Hugging Face directory of which only config.json is read. Sizes are what the published
config.json says; parameters are counted from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.model.config import ModelConfig
from ..core.model.loading import TINY, read_config, weight_shapes


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder, and in how many bytes its weights and its K and V are kept."""

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_context: int  # tokens, prompt and output together
    num_parameters: int
    num_looked_up: int  # of these, rows of tables that no matrix is multiplied with: one row is read for a token
    num_windowed_layers: int = 0  # layers that see only a window; their K and V are counted in full all the same
    weight_bits: int = 16
    kv_bits: int = 16

    @property
    def num_head_parameters(self) -> int:
        """Of the matrix that turns a hidden state into logits, which may be the embedding table itself."""
        return self.vocab_size * self.hidden_size

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.weight_bits // 8

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token, over all layers (Kwon et al. 2023, §3)."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * self.kv_bits // 8

    @property
    def kv_arithmetic(self) -> str:
        """The same as a sum that can be checked by hand."""
        return (
            f"2 (K and V) x {self.num_layers} layers x {self.num_kv_heads} KV heads x {self.head_size} x "
            f"{self.kv_bits // 8} {'byte' if self.kv_bits == 8 else 'bytes'} = {self.kv_bytes_per_token:,} bytes"
        )


def spec_of(config: ModelConfig, name: str) -> ModelSpec:
    """A model of the Llama family in numbers."""
    sizes = {tensor: math.prod(shape) for tensor, shape in weight_shapes(config).items()}
    return ModelSpec(
        name=name,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        num_parameters=sum(sizes.values()),
        num_looked_up=0 if config.tie_word_embeddings else sizes["model.embed_tokens.weight"],
        num_windowed_layers=sum(window is not None for window in config.sliding_windows),
    )


def _opt(name: str, num_layers: int, num_heads: int, hidden: int) -> ModelSpec:
    """OPT (Zhang et al. 2022), which the paper serves: biases everywhere, learned positions, a tied head."""
    intermediate, vocab, context = 4 * hidden, 50272, 2048
    attention = 4 * (hidden * hidden + hidden)
    mlp = 2 * hidden * intermediate + intermediate + hidden
    norms = 2 * 2 * hidden
    positions = (context + 2) * hidden
    return ModelSpec(
        name=name,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=hidden // num_heads,
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_context=context,
        num_parameters=num_layers * (attention + mlp + norms) + 2 * hidden + vocab * hidden + positions,
        num_looked_up=positions,
    )


def _llama(
    name: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, context: int,
    *, head_size: int = 0, model_type: str = "llama", tied: bool = False,
) -> ModelSpec:  # fmt: skip
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size or hidden // heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        attention_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        model_type=model_type,
    )
    return spec_of(config, name)


MODELS = {
    spec.name: spec
    for spec in (
        _opt("OPT-13B", 40, 40, 5120),
        _opt("OPT-66B", 64, 72, 9216),
        _opt("OPT-175B", 96, 96, 12288),
        # From each model's config.json on the Hugging Face hub: layers, hidden, intermediate, heads, KV heads, ...
        _llama("Llama-2-7B", 32, 4096, 11008, 32, 32, 32000, 4096),
        _llama("Llama-2-13B", 40, 5120, 13824, 40, 40, 32000, 4096),
        _llama("Llama-2-70B", 80, 8192, 28672, 64, 8, 32000, 4096),
        _llama("Llama-3-8B", 32, 4096, 14336, 32, 8, 128256, 8192),
        _llama("Llama-3-70B", 80, 8192, 28672, 64, 8, 128256, 8192),
        _llama("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128256, 131072),
        _llama("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128256, 131072),
        _llama("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 128256, 131072, tied=True),
        _llama("Mistral-7B-v0.3", 32, 4096, 14336, 32, 8, 32768, 32768, model_type="mistral"),
        _llama("Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 151936, 32768, model_type="qwen2", tied=True),
        _llama("Qwen2.5-7B", 28, 3584, 18944, 28, 4, 152064, 131072, model_type="qwen2"),
        _llama("Qwen2.5-72B", 80, 8192, 29568, 64, 8, 152064, 131072, model_type="qwen2"),
        _llama("Qwen3-8B", 36, 4096, 12288, 32, 8, 151936, 40960, model_type="qwen3", head_size=128),
    )
}
DEFAULT_MODEL = "Llama-3-8B"


def model_named(name: str | Path) -> ModelSpec:
    """A known model ("tiny" is the embedded one, in float32), or a Hugging Face directory's config.json.

    Raises ValueError that lists the known ones, or says what is wrong with the directory's config.
    """
    text = str(name)
    if text.casefold() == "tiny":
        return replace(spec_of(read_config(TINY), "tiny"), weight_bits=32, kv_bits=32)
    for spec in MODELS.values():
        if spec.name.casefold() == text.casefold():
            return spec
    directory = Path(name)
    if directory.is_dir():
        return spec_of(read_config(directory), directory.resolve().name)
    raise ValueError(f"model is {text!r}; a Hugging Face directory or one of tiny, {', '.join(MODELS)} is needed")
