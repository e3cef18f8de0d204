"""Models of transformers with a PagedCache, whose kernels and block copies run on the stand-in.

PYTHONPATH=src:tests python -m strict_gpu tests/strict_gpu/hugging_face.py

torch lies in host memory here, and the stand-in speaks no DLPack: this file carries what passes between the two. The
pool's arrays stay where they are, as they would on a GPU; the others are copied.
"""

from __future__ import annotations

import json
from typing import Any

import cupy
import torch
from interop import test_huggingface as models

from paged_ref.core.attention import attention
from paged_ref.core.attention.attention import AttentionCall
from paged_ref.interop import cache_api, hf_cache, kernel_api
from paged_ref.interop.huggingface import register

MADE: dict[int, Any] = {}  # by address: the pool's arrays on the device
SEEN: set[str] = set()
pool_layer = hf_cache.KVPool.layer


def numpy_of(tensor: Any) -> Any:
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def adopt(array: Any, name: str) -> Any:
    if not isinstance(array, torch.Tensor):
        return array
    return MADE[array.data_ptr()] if array.data_ptr() in MADE else cupy.asarray(numpy_of(array))


def like_caller(result: Any, caller: Any) -> Any:
    return torch.from_numpy(result.get()).view(caller.dtype) if isinstance(caller, torch.Tensor) else result


def layer(pool: Any, index: int, key: Any) -> Any:
    if index not in pool.layers:
        arrays = [cupy.asarray(numpy_of(tensor)) for tensor in pool_layer(pool, index, key)]
        pool.layers[index] = tuple(torch.from_numpy(array._a).view(key.dtype) for array in arrays)
        MADE.update({tensor.data_ptr(): array for tensor, array in zip(pool.layers[index], arrays, strict=True)})
    return pool_layer(pool, index, key)


def attend(call: AttentionCall, backend: str) -> None:
    SEEN.add(type(call.keys).__module__.partition(".")[0])
    attention.attend(call, backend)


def main() -> None:
    replaced: list[tuple[Any, Any]] = [(owner, adopt) for owner in (cache_api, kernel_api)]
    replaced += [(kernel_api, like_caller), (kernel_api, attend), (hf_cache.KVPool, layer)]
    for owner, mine in replaced:
        setattr(owner, mine.__name__, mine)
    register()
    same = {}
    for family, way in (("llama", "beams"), ("gemma2", "greedy"), ("gpt_oss", "greedy")):
        model, how = models.build(family), models.WAYS[way]
        expected = models.generate(model, new=8, **how)
        tokens = models.generate(models.paged(model), new=8, cache=models.cache_of(), **how)
        same[family] = torch.equal(tokens, expected)
    same["without a cache"] = torch.equal(models.generate(model, new=8, use_cache=False), expected)
    cache = models.cache_of()
    models.generate(model.bfloat16(), new=4, cache=cache)
    same["bfloat16"] = cache.pool.layers[0][0].dtype is torch.bfloat16
    print(json.dumps({"same": same, "arrays": sorted(SEEN)}))


if __name__ == "__main__":
    main()
