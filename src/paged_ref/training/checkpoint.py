"""What a run leaves behind: a model in Hugging Face form, and the state that a run continues from.

Each file is written under another name and then renamed, so that there is a complete file at any moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..core.model.config import ModelConfig
from ..core.model.tokenizer import Tokenizer
from ..extras.memory_limit import machine_memory
from ..extras.reading import open_file, parse_json
from .parameters import Parameters

STATE = "training_state.safetensors"


@dataclass(frozen=True, slots=True)
class State:
    """A run after some steps. Arrays are on the host."""

    run: dict[str, Any]  # what determines the weights: settings, sizes, a digest of the text
    step: int
    arrays: dict[str, np.ndarray]


def save_model(directory: Path, weights: Parameters, tokenizer: Tokenizer, dtype: DTypeLike) -> None:
    """config.json, tokenizer.json and model.safetensors, as transformers and LLM read them. Raises ValueError."""
    put(directory / "config.json", json.dumps(hf_config(weights.config, dtype), indent=1).encode())
    put(directory / "tokenizer.json", tokenizer.inner.to_str().encode())
    # transformers reads only files that name the framework of their tensors
    put(directory / "model.safetensors", save(weights.export(dtype), metadata={"format": "pt"}))


def hf_config(config: ModelConfig, dtype: DTypeLike) -> dict[str, Any]:
    """The config under the names of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0] if config.eos_token_ids else None,
        "torch_dtype": np.dtype(dtype).name,
    }


def save_state(directory: Path, state: State) -> None:
    """Write the state. Raises ValueError where it cannot be written; the previous state then stays."""
    metadata = {"run": json.dumps(state.run), "step": str(state.step)}
    metadata["sha256"] = _checksum(metadata["run"], metadata["step"], state.arrays)
    put(directory / STATE, save(state.arrays, metadata=metadata))


def load_state(directory: Path) -> State:
    """Read the state. Raises ValueError where there is none, or a bit of it is another one than was written."""
    path = directory / STATE
    if not path.exists():
        raise ValueError(f"{path} is missing; there is no run to continue")
    open_file(path, machine_memory()).close()  # refuses what is no regular file, or too large
    try:
        with safe_open(path, framework="np") as file:
            metadata = {"run": "", "step": "", "sha256": "", **(file.metadata() or {})}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        if not metadata["sha256"]:
            raise ValueError("it has no checksum, so an earlier version wrote it; begin the run anew")
        if metadata["sha256"] != _checksum(metadata["run"], metadata["step"], arrays):
            raise ValueError("its checksum is another one; the file is damaged, or of another version")
        run = parse_json(metadata["run"])
        if not isinstance(run, dict):
            raise ValueError(f"run is a {type(run).__name__}; a JSON object is needed")
        return State(run, int(metadata["step"]), arrays)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a run's state: {error}") from None


def _checksum(run: str, step: str, arrays: dict[str, np.ndarray]) -> str:
    checksum = hashlib.sha256(f"{run} {step}".encode())
    for name, array in sorted(arrays.items()):
        checksum.update(f" {name} {array.dtype} {array.shape} ".encode())
        checksum.update(np.ascontiguousarray(array).reshape(-1).data)
    return checksum.hexdigest()


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """No other training writes to this directory meanwhile. Raises ValueError where one does already.

    The lock is the system's: it ends with the process, however that ends, and leaves no file.
    """
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        folder = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{directory} cannot be written: {error.strerror}") from None
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{directory} is in use: another training writes to it") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if is_new:
                    directory.rmdir()  # if nothing came of it
    finally:
        os.close(folder)


def put(path: Path, content: bytes) -> None:
    """Replace a file in one step. Raises ValueError where that fails; the previous file then stays."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
