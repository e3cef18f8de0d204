"""What a model and its requests take of memory, held against what there is before any of it is taken."""

from __future__ import annotations

from ..core.device import on_gpu
from ..core.model.config import ModelConfig, kv_bytes_per_token
from ..extras.memory_limit import require_memory
from .architectures import num_weights

SAMPLE_BYTES = 1 << 14  # that a sample takes before its first token: its sequence, output and random generator
# Formats of K and V that NumPy has no name for, by a dtype of the same size.
SAME_SIZE = {"bfloat16": "float16", "float8": "int8"}


def require_kv_memory(
    config: ModelConfig, dtype: str, kv_dtype: str, device: tuple[str, int], host: tuple[str, int] = ("", 0),
    unit: int = 1,
) -> None:  # fmt: skip
    """Raise ValueError unless the weights in `dtype` and K and V in `kv_dtype` fit: those of the device and those of
    the host, each an argument's name and its value, which counts blocks of `unit` tokens."""
    bytes_per_unit = unit * kv_bytes_per_token(config, SAME_SIZE.get(kv_dtype, kv_dtype))
    blocks = f", in blocks of {unit} tokens" if unit > 1 else ""
    on_device = num_weights(config) * (2 if dtype == "float16" else 4) + device[1] * bytes_per_unit
    what = f"{device[0]} is {device[1]}{blocks}: a KV cache of this size, with the weights,"
    require_memory(what, on_device, device=True)
    on_host = host[1] * bytes_per_unit + (0 if on_gpu else on_device)
    require_memory(f"{host[0]} is {host[1]}{blocks}: a pool of this size on the host, with all the rest,", on_host)
