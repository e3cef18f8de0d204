"""Checkpoints from elsewhere: from a Hugging Face directory to a config, weights and a tokenizer that are right.

Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..core.model.loading import TINY, Checkpoint
from ..core.model.tokenizer import Tokenizer
from ..extras.formats import from_bfloat16
from ..extras.memory_limit import require_memory
from ..extras.reading import open_file, read_json_object
from .architectures import num_weights
from .hf_config import HFConfig, config_from_hf, token_ids
from .hf_tokenizer import HFTokenizer, MissingTokenizer, read_tokenizer
from .tensor_names import COMPUTED, StoredWeights, name_prefix, require_tensors, stored_tensors, table_name

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # NumPy has no bfloat16: its bits


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what is wrong, where, and what was expected."""


def load(directory: str | Path) -> Checkpoint:
    """Read config.json, tokenizer.json and the headers of the safetensors; "tiny" is the embedded checkpoint, and
    NAME.gguf a GGUF file.

    Weights are one model.safetensors or the shards of model.safetensors.index.json, in float32, float16 or
    bfloat16. Without a tokenizer.json, prompts are token ids. Raises CheckpointError, a ValueError, in one sentence:
    what is missing, broken, too large for this machine, or does not fit.
    """
    if not isinstance(directory, (str, os.PathLike)) or directory == "":
        raise CheckpointError(f"model is {directory!r}; 'tiny' or a directory is needed")
    directory = TINY if directory == "tiny" else Path(directory)
    if directory.suffix == ".gguf":
        from .gguf_files import load_gguf  # here: few need it

        with _refusals():
            open_file(directory, sys.maxsize).close()
        with _refusals(f"{directory}: "):
            return load_gguf(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; a checkpoint in Hugging Face form is needed")
    config = read_config(directory)
    with _refusals():
        # float16 is the smallest form of the weights that the model is computed with
        require_memory(f"{directory / 'config.json'}: a model of this size", 2 * num_weights(config), device=True)
        weights = _find_weights(config, _read_headers(directory), directory)
        path = directory / "tokenizer.json"
        tokenizer = read_tokenizer(path) if path.exists() else MissingTokenizer(directory)
        return Checkpoint(_with_eos(config, tokenizer), weights, tokenizer)


@contextmanager
def _refusals(where: str = "") -> Iterator[None]:
    """What is refused inside is a CheckpointError, with `where` before it."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}{error}") from None


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies, or some rows of one."""

    path: Path
    dtype: str  # in the words of safetensors: F32, F16, BF16
    shape: tuple[int, ...]  # in the file
    offset: int  # bytes from the beginning of the file
    transposed: bool = False  # in the file
    first: int = 0  # row
    count: int | None = None  # of rows; None: all


def read_tensor(entry: TensorEntry) -> np.ndarray:
    """float32 and float16 are views of the mapped file; bfloat16 becomes float32."""
    mapped = np.memmap(entry.path, _DTYPES[entry.dtype], mode="r", offset=entry.offset, shape=entry.shape)
    array = np.asarray(mapped)  # each part of a memmap costs more than one of a plain array
    end = None if entry.count is None else entry.first + entry.count
    part: np.ndarray = (array.T if entry.transposed else array)[entry.first : end]
    return part if entry.dtype != "BF16" else from_bfloat16(part)


def read_config(directory: Path) -> HFConfig:
    """config.json, with the EOS ids of generation_config.json if any: Llama 3 keeps its list there.

    The weights need not be there. Raises CheckpointError.
    """
    path, generation = directory / "config.json", directory / "generation_config.json"
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    with _refusals():
        hf = read_json_object(path)
        more = read_json_object(generation) if generation.exists() else {}
    with _refusals(f"{path}: "):
        config = config_from_hf(hf)
    with _refusals(f"{generation}: "):
        return replace(config, eos_token_ids=token_ids(more, "eos_token_id") or config.eos_token_ids)


def _with_eos(config: HFConfig, tokenizer: Tokenizer) -> HFConfig:
    """The config, with the EOS of tokenizer_config.json among its own: a chat model may name its EOS only there."""
    token_id = tokenizer.token_id("eos_token") if isinstance(tokenizer, HFTokenizer) else None
    if token_id is None or token_id >= config.vocab_size or token_id in config.eos_token_ids:
        return config
    return replace(config, eos_token_ids=(*config.eos_token_ids, token_id))


def _read_headers(directory: Path) -> dict[str, TensorEntry]:
    """Of all weight files."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return _read_header(single)
    if not index.exists():
        pickled = sorted(p.name for suffix in ("bin", "pt", "pth") for p in directory.glob(f"*.{suffix}"))
        hint = f"; {pickled[0]} is pickled, which is not read: save it as safetensors" if pickled else ""
        raise CheckpointError(f"{directory} has neither {single.name} nor {index.name}{hint}")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        entries |= _read_header(_shard(directory, shard, index.name))
    return entries


def _shard(directory: Path, name: str, index: str) -> Path:
    """The file of a shard, which lies in the directory, or in the Hub's cache, whose snapshots link to its blobs."""
    path, home = directory / name, directory.resolve()
    if not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
        raise CheckpointError(f"{directory / index} names the shard {name!r}; the plain name of a file is needed")
    if not path.exists():
        raise CheckpointError(f"{path} is missing; {index} names it")
    blobs = [home.parents[1] / "blobs"] if home.parent.name == "snapshots" else []
    if path.resolve().parent not in [home, *blobs]:
        raise CheckpointError(f"{path} is a link to {path.resolve()}; {index} may name files of its directory only")
    return path


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """Names, dtypes, shapes and places of the tensors in a file that the safetensors library finds whole.

    The library has no NumPy reader for bfloat16, so the offsets are read here and one way serves all dtypes:
    8 bytes of header size, the header in JSON, then the tensors.
    """
    with open_file(path, sys.maxsize) as file:
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))  # the library has checked each field of it
    header.pop("__metadata__", None)
    return {
        name: TensorEntry(path, tensor["dtype"], tuple(tensor["shape"]), 8 + size + tensor["data_offsets"][0])
        for name, tensor in header.items()
    }


def _find_weights(config: HFConfig, entries: dict[str, TensorEntry], directory: Path) -> StoredWeights:
    """The same tensors under Llama's names. Every tensor of the config is there, in its shape, in a known dtype; and
    none is left over."""
    prefix = name_prefix(config, entries)
    head, embedding = "lm_head.weight", prefix + table_name(config)
    if config.tie_word_embeddings and head in entries and embedding not in entries:
        entries[embedding] = entries[head]  # one table, which may be stored under either name
    stored = {name if name == head else prefix + name: tensor for name, tensor in stored_tensors(config).items()}
    # Old files also keep RoPE's frequencies or masks, and some keep a head that is tied anyway.
    spare = [name for name in entries if name not in stored and (name == head or name.endswith(COMPUTED))]
    wanted = {name: tensor.shape for name, tensor in stored.items()}
    there = {name: entry.shape for name, entry in entries.items() if name not in spare}
    require_tensors(directory, wanted, there, config.model_type)
    found: dict[str, TensorEntry] = {}
    for name, tensor in stored.items():
        entry, first = entries[name], 0
        if entry.dtype not in _DTYPES:
            raise CheckpointError(f"{entry.path}: {name} has dtype {entry.dtype}; known are {', '.join(_DTYPES)}")
        for part, rows in tensor.parts.items():
            found[part] = replace(entry, transposed=tensor.transposed, first=first, count=rows)
            first += rows
    if config.tie_word_embeddings and head in entries:
        table, other = entries[embedding], entries[head]
        alike = (other.shape, other.dtype) == (table.shape, table.dtype)
        if not alike or not np.array_equal(read_tensor(other), read_tensor(table)):
            raise CheckpointError(
                f"{directory}: tie_word_embeddings is true, and {head} is another table than {embedding}; if the model "
                "has both, set tie_word_embeddings to false"
            )
    return StoredWeights(found, read_tensor)
