"""Models in numbers: the names of data/models.toml, Hugging Face directories, of which only config.json is read, and
numbers given by hand. model_config.py reads the words of config.json, of which the table is made, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path

from ..core.model.loading import TINY
from ..extras.reading import read_json_object
from .model_config import ModelSpec, spec_of_config
from .tables import read_table
from .traces import TraceRequest

DEFAULT_MODEL = "Llama-3-8B"
CONTEXT_BY_HAND = 131_072  # tokens
INDEX = "model.safetensors.index.json"
# By hand at most: bytes of K and V of a token, parameters, layers.
MOST_BY_HAND = {"--kv-bytes-per-token": 2**30, "--weights": 10**15, "--active-weights": 10**15, "--layers": 10_000}

MODELS: dict[str, ModelSpec] = {
    name: replace(spec_of_config(entry, name), hub=entry["hub"], source=f"{entry['source']}, {entry['looked_up']}")
    for name, entry in read_table("models")["models"].items()
}


def model_named(name: str | Path) -> ModelSpec:
    """A known model, also by its name on the hub ("tiny" is the embedded one, in float32), or a Hugging Face
    directory's config.json.

    Raises ValueError that lists the known names, or says what is wrong with the directory's config.
    """
    text = str(name)
    if text.casefold() == "tiny":
        return replace(_of_directory(TINY), name="tiny", weight_bits=32, kv_bits=32)
    for spec in MODELS.values():
        if text.casefold() in (spec.name.casefold(), spec.hub.casefold()):
            return spec
    directory = Path(name)
    if text and directory.is_dir():
        return _of_directory(directory)
    raise ValueError(f"model is {text!r}; a Hugging Face directory or one of tiny, {', '.join(MODELS)} is needed")


def _of_directory(directory: Path) -> ModelSpec:
    """config.json, and the bytes of the weights where the index of the checkpoint has them."""
    path, index = directory / "config.json", directory / INDEX
    config = read_json_object(path)
    try:
        spec = spec_of_config(config, directory.resolve().name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    spec = replace(spec, hub=str(directory), source=f"{path}; parameters counted from the sizes")
    metadata = read_json_object(index).get("metadata") if index.exists() else None
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if type(total) is not int or total < 1:
        return spec
    return _with_weights(replace(spec, source=f"{path} and {INDEX}"), total * 8 // spec.weight_bits)


@dataclass(frozen=True, slots=True)
class ByHand:
    """Numbers in place of a model's own."""

    kv_bytes: int | None = None  # of a token, in all layers
    weights: float | None = None  # parameters
    active_weights: float | None = None  # of these, those that a token meets
    layers: int | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.kv_bytes, self.weights, self.active_weights, self.layers))

    def model(self) -> ModelSpec:
        """A model of nothing else. The hidden size, which the traffic between GPUs and the arithmetic of attention
        need, follows from the weights of a usual layer, 12 times its square. Raises ValueError."""
        missing = {"--kv-bytes-per-token": self.kv_bytes, "--weights": self.weights, "--layers": self.layers}
        if None in missing.values():
            names = " and ".join(name for name, value in missing.items() if value is None)
            raise ValueError(f"a model by hand needs {names} too; --model names one that has all numbers")
        assert self.kv_bytes
        assert self.weights
        assert self.layers
        hidden = max(1, round(sqrt((self.active_weights or self.weights) / 12 / self.layers)))
        spec = ModelSpec(
            name="a model by hand",
            num_layers=self.layers,
            hidden_size=hidden,
            num_heads=0,
            num_kv_heads=0,
            head_size=0,
            vocab_size=0,
            max_context=CONTEXT_BY_HAND,
            num_kv_layers=self.layers,
            kv_numbers=0,
            pair_operations=4 * self.layers * hidden,
            source="the command line",
        )
        return self.change(spec)

    def change(self, spec: ModelSpec) -> ModelSpec:
        """`spec` with these numbers. Raises ValueError."""
        given = zip(MOST_BY_HAND.items(), (self.kv_bytes, self.weights, self.active_weights, self.layers), strict=True)
        for (option, most), value in given:
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{option} is {value:g}; 1 to {most:,} is possible")
        weights = spec.num_parameters if self.weights is None else round(self.weights)
        active = round(self.active_weights) if self.active_weights is not None else None
        if active is not None and not 1 <= active <= weights:
            raise ValueError(f"--active-weights is {active:,}; 1 to all {weights:,} weights is possible")
        if self.kv_bytes is not None:
            spec = replace(spec, kv_bytes_by_hand=self.kv_bytes)
        if self.layers is not None and self.layers != spec.num_layers:
            spec = _with_layers(spec, self.layers)
        if self.weights is not None:
            spec = _with_weights(spec, weights)
        if active is not None:  # all weights in experts, of which a token meets the share
            spec = replace(spec, num_routed=spec.num_parameters, routed_share=active / weights, num_looked_up=0)
        return spec


def _with_layers(spec: ModelSpec, layers: int) -> ModelSpec:
    """`spec` with so many layers like its own, on average."""
    changed = {
        key: round(getattr(spec, key) * layers / spec.num_layers)
        for key in ("num_kv_layers", "num_windowed_layers", "pair_operations", "num_routed")
    }
    ends = spec.num_looked_up + spec.vocab_size * spec.hidden_size
    parameters = ends + round((spec.num_parameters - ends) * layers / spec.num_layers)
    return replace(spec, num_layers=layers, num_parameters=parameters, **changed)


def _with_weights(spec: ModelSpec, weights: int) -> ModelSpec:
    """`spec` with so many parameters; experts keep their share."""
    if not spec.num_parameters:
        return replace(spec, num_parameters=weights)
    factor = weights / spec.num_parameters
    looked_up = min(spec.num_looked_up, weights // 2)
    return replace(spec, num_parameters=weights, num_looked_up=looked_up, num_routed=round(spec.num_routed * factor))


def with_windows(spec: ModelSpec, requests: Iterable[TraceRequest]) -> ModelSpec:
    """`spec` with the share of K and V that windowed layers keep of such requests: the mean over the time in which a
    sequence runs, which grows by a token in each step. Servers that drop what has left the window keep and read that
    much."""
    if spec.window is None:
        return spec
    kept = full = 0
    for each in requests:
        first, last = each.prompt_len, each.prompt_len + each.output_len - 1
        full += (first + last) * each.output_len // 2 * spec.full_kv_bytes
        growing = range(first, min(last, spec.window) + 1)  # lengths inside the window
        inside = (first + growing[-1]) * len(growing) // 2 if growing else 0
        windowed = spec.full_kv_bytes * spec.num_windowed_layers // spec.num_kv_layers
        seen = inside + (each.output_len - len(growing)) * spec.window
        kept += (spec.full_kv_bytes - windowed) * ((first + last) * each.output_len // 2) + windowed * seen
    return replace(spec, kv_share=kept / full) if full else spec
