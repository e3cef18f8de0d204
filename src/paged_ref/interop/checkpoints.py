"""Checkpoints from elsewhere: from a Hugging Face directory to a config, weights and a tokenizer that are right.

Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open

from ..core.model.loading import TINY, Checkpoint
from ..core.model.tokenizer import Tokenizer
from ..extras.formats import from_bfloat16
from .architectures import weight_shapes
from .hf_config import HFConfig, config_from_hf, token_ids

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # NumPy has no bfloat16: its bits


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what is wrong, where, and what was expected."""


def load(directory: str | Path) -> Checkpoint:
    """Read config.json, tokenizer.json and the headers of the safetensors; "tiny" is the embedded checkpoint.

    Weights are one model.safetensors or the shards of model.safetensors.index.json, in float32, float16 or
    bfloat16. Raises CheckpointError, a ValueError, in one sentence: what is missing, broken or does not fit.
    """
    directory = TINY if directory == "tiny" else Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; a checkpoint in Hugging Face form is needed")
    config = read_config(directory)
    weights = _read_weights(directory)
    _check_weights(config, weights, directory)
    return Checkpoint(config, weights, read_tokenizer(directory / "tokenizer.json"))


def read_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer.json. Raises CheckpointError where it is missing or not a tokenizer."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path} is missing; a tokenizer.json of Hugging Face tokenizers is needed")
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from None


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    path: Path
    dtype: str  # in the words of safetensors: F32, F16, BF16
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file


class Weights(Mapping[str, np.ndarray]):
    """Tensors of one or many safetensors files, read from disk each time they are asked for.

    float32 and float16 are views of the mapped file; bfloat16 becomes float32.
    """

    def __init__(self, entries: dict[str, TensorEntry]) -> None:
        self.entries = entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        array = np.memmap(entry.path, _DTYPES[entry.dtype], mode="r", offset=entry.offset, shape=entry.shape)
        numbers: np.ndarray = array if entry.dtype != "BF16" else from_bfloat16(array)
        return numbers


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; a JSON object is needed")
    return value


def read_config(directory: Path) -> HFConfig:
    """config.json, with the EOS ids of generation_config.json if any: Llama 3 keeps its list there.

    The weights need not be there. Raises CheckpointError.
    """
    path = directory / "config.json"
    generation = directory / "generation_config.json"
    hf = _read_json(path)
    try:
        config = config_from_hf(hf)
        if generation.exists():
            path = generation
            eos_token_ids = token_ids(_read_json(generation), "eos_token_id")
            config = replace(config, eos_token_ids=eos_token_ids or config.eos_token_ids)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return config


def _read_weights(directory: Path) -> Weights:
    """The headers of all weight files."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return Weights(_read_header(single))
    if not index.exists():
        pickled = sorted(p.name for suffix in ("bin", "pt", "pth") for p in directory.glob(f"*.{suffix}"))
        hint = f"; {pickled[0]} is pickled, which is not read: save it as safetensors" if pickled else ""
        raise CheckpointError(f"{directory} has neither {single.name} nor {index.name}{hint}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).is_file():
            raise CheckpointError(f"{directory / shard} is missing; {index.name} names it")
        entries |= _read_header(directory / shard)
    return Weights(entries)


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """Names, dtypes, shapes and places of the tensors in a file that the safetensors library finds whole.

    The library has no NumPy reader for bfloat16, so the offsets are read here and one way serves all dtypes:
    8 bytes of header size, the header in JSON, then the tensors.
    """
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: TensorEntry(path, tensor["dtype"], tuple(tensor["shape"]), 8 + size + tensor["data_offsets"][0])
        for name, tensor in header.items()
    }


def _check_weights(config: HFConfig, weights: Weights, directory: Path) -> None:
    """Every tensor of the config is there, in its shape, in a known dtype; and none is left over."""
    shapes = weight_shapes(config)
    for name, shape in shapes.items():
        entry = weights.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{directory} has no tensor {name}; the config wants one of shape {list(shape)}")
        if entry.shape != shape:
            raise CheckpointError(f"{entry.path}: {name} has shape {list(entry.shape)}; the config wants {list(shape)}")
        if entry.dtype not in _DTYPES:
            raise CheckpointError(f"{entry.path}: {name} has dtype {entry.dtype}; known are {', '.join(_DTYPES)}")
    # Old files also keep RoPE's frequencies, and some keep a head that is tied anyway.
    extra = [n for n in weights if n not in shapes and n != "lm_head.weight" and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise CheckpointError(f"{directory} has a tensor {extra[0]}; a {config.model_type} model has no place for it")
