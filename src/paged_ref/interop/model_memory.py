"""What a model and its requests take of memory, held against what there is before any of it is taken."""

from __future__ import annotations

from ..core.device import on_gpu
from ..core.model.config import ModelConfig, kv_bytes_per_token
from ..extras.formatted_kv import format_of
from ..extras.memory_limit import require_memory
from .architectures import num_weights

SAMPLE_BYTES = 1 << 14  # that a sample takes before its first token: its sequence, output and random generator


def format_bytes_per_token(config: ModelConfig, kv_dtype: str) -> int:
    """Bytes of K and V that one token keeps over all layers, in a dtype or in a format of extras/formatted_kv.py."""
    return kv_bytes_per_token(config, format_of(kv_dtype) or kv_dtype)


def require_kv_memory(
    config: ModelConfig, dtype: str, kv_dtype: str, device: tuple[str, int], host: tuple[str, int] = ("", 0),
    unit: int = 1,
) -> None:  # fmt: skip
    """Raise ValueError unless the weights in `dtype` and K and V in `kv_dtype` fit: those of the device and those of
    the host, each an argument's name and its value, which counts blocks of `unit` tokens."""
    bytes_per_unit = unit * format_bytes_per_token(config, kv_dtype)
    blocks = f", in blocks of {unit} tokens" if unit > 1 else ""
    on_device = num_weights(config) * (2 if dtype == "float16" else 4) + device[1] * bytes_per_unit
    what = f"{device[0]} is {device[1]}{blocks}: a KV cache of this size, with the weights,"
    require_memory(what, on_device, device=True)
    on_host = host[1] * bytes_per_unit + (0 if on_gpu else on_device)
    require_memory(f"{host[0]} is {host[1]}{blocks}: a pool of this size on the host, with all the rest,", on_host)
