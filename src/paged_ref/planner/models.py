"""Models in numbers: names of data/models.toml, and Hugging Face directories, of which only config.json is read.

Parameters are counted from the sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..core.model.loading import TINY
from ..interop.checkpoints import read_config
from ..interop.hf_config import HFConfig
from .tables import read_table


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder, and in how many bytes its weights and its K and V are kept."""

    name: str
    num_layers: int  # this and the next fields: in the order of the columns of data/models.toml
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    max_context: int  # tokens, prompt and output together
    num_parameters: int = 0
    num_looked_up: int = 0  # of these, in tables of which a step reads one row for each token, and multiplies none
    num_windowed_layers: int = 0  # layers that see only a window; their K and V are counted in full nevertheless
    weight_bits: int = 16
    kv_bits: int = 16

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.weight_bits // 8

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token, over all layers (Kwon et al. 2023, §3)."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * self.kv_bits // 8

    @property
    def kv_arithmetic(self) -> str:
        """kv_bytes_per_token as a product that can be checked by hand."""
        return (
            f"2 (K and V) x {self.num_layers} layers x {self.num_kv_heads} KV heads x {self.head_size} x "
            f"{self.kv_bits // 8} {'byte' if self.kv_bits == 8 else 'bytes'} = {self.kv_bytes_per_token:,} bytes"
        )


def spec_of(config: HFConfig, name: str) -> ModelSpec:
    """A model of the Llama family in numbers."""
    spec = ModelSpec(
        name=name,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        num_windowed_layers=sum(window is not None for window in config.sliding_windows),
    )
    return _with_parameters(spec, config.model_type, config.tie_word_embeddings)


def _with_parameters(spec: ModelSpec, family: str, tied: bool) -> ModelSpec:
    """`spec` with the parameters counted. `tied`: the logits come from the embedding table."""
    hidden, intermediate, embedding = spec.hidden_size, spec.intermediate_size, spec.vocab_size * spec.hidden_size
    q_size, kv_size = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
    attention = 2 * hidden * (q_size + kv_size)  # q and output, k and v
    if family == "opt":  # biases everywhere, norms with a bias, learned positions
        layer = attention + 4 * hidden + 2 * hidden * intermediate + intermediate + hidden + 2 * 2 * hidden
        looked_up, final_norm = (spec.max_context + 2) * hidden, 2 * hidden
    else:
        layer = attention + 3 * hidden * intermediate + 2 * hidden
        layer += {"qwen2": q_size + 2 * kv_size, "qwen3": 2 * spec.head_size}.get(family, 0)  # biases; norms of q, k
        looked_up, final_norm = 0 if tied else embedding, hidden
    num_parameters = spec.num_layers * layer + final_norm + embedding + looked_up
    return replace(spec, num_parameters=num_parameters, num_looked_up=looked_up)


MODELS = {
    name: _with_parameters(ModelSpec(name, *sizes), family, tied)
    for family, models in read_table("models")["families"].items()
    for name, (*sizes, tied, _source) in models.items()
}
DEFAULT_MODEL = "Llama-3-8B"


def model_named(name: str | Path) -> ModelSpec:
    """A known model ("tiny" is the embedded one, in float32), or a Hugging Face directory's config.json.

    Raises ValueError that lists the known names, or says what is wrong with the directory's config.
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
