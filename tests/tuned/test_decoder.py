"""The decoder with few launches, its kernels run by the tracer: the numbers of the core's, and how many launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="greenlet runs the tracer's threads")
pytest.importorskip("numba_cuda", reason="numba-cuda makes the kernels (extra test, cuda12 or cuda13)")

from support.stepping import Stepper

from paged_ref.core.device import on_gpu
from paged_ref.core.model.config import ModelConfig
from paged_ref.interop.architectures import build_model, random_weights
from paged_ref.interop.hf_config import HFConfig
from paged_ref.interop.rope import RopeScaling
from paged_ref.tracer import trace
from paged_ref.tuned import launching
from paged_ref.tuned.decoder import FusedDecoder
from paged_ref.tuned.kv import TunedKV

LLAMA = ModelConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1, head_size=16,
    max_position_embeddings=64,
)  # fmt: skip
QWEN = HFConfig(
    **{name: getattr(LLAMA, name) for name in LLAMA.__slots__}, qkv_bias=True, qk_norm="head",
    rope_scaling=RopeScaling("dynamic", 4.0, 4),
)  # fmt: skip
PROMPTS = [[3, 14, 15, 9, 2], [7], [1, 2]]
NEXT = [[8], [], [9]]
LAYER = ["turn_and_write_kernel", "flash_attention", "add_norm_kernel", "gated_kernel", "add_norm_kernel"]


def by_tracer(launched: list[str]) -> Callable[[Any], launching.Start]:
    def run(kernel: Any) -> launching.Start:
        def start(grid: Any, block: Any, args: tuple[Any, ...]) -> None:
            launched.append(kernel.py_func.__name__)
            trace.run(kernel, grid, block, *args)

        return start

    return run


def stepper_of(config: ModelConfig, dtype: str, fuse: bool) -> Stepper:
    model = build_model(config, random_weights(config), dtype)
    stepper = Stepper(FusedDecoder(model) if fuse else model, 3, 12)
    sizes = (config.num_layers, *stepper.kv.device.shape[2:])
    stepper.kv = TunedKV(*sizes, dtype, backend="cuda-flash" if fuse else "reference")
    return stepper


def logits(stepper: Stepper) -> list[np.ndarray]:
    """Of a step of prompts, and of a step that decodes for two of them."""
    return [np.concatenate(stepper.step(tokens)) for tokens in (PROMPTS, NEXT)]


WINDOW = replace(LLAMA, sliding_windows=(3, None))


@pytest.mark.parametrize(
    ("config", "dtype"), [(LLAMA, "float32"), (LLAMA, "float16"), (QWEN, "float32"), (WINDOW, "float32")],
    ids=["llama", "float16", "qwen", "window"],
)  # fmt: skip
def test_the_logits_are_the_core_decoders(config: ModelConfig, dtype: str) -> None:
    want = logits(stepper_of(config, dtype, fuse=False))
    with launching.on_host(by_tracer([])):
        got = logits(stepper_of(config, dtype, fuse=True))
    bound = 2e-2 if dtype == "float16" else 1e-4
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound)


def test_a_layer_of_a_decode_step_is_five_kernels() -> None:
    """With its four products: nine launches, and one more where sequences are split."""
    launched: list[str] = []
    with launching.on_host(by_tracer(launched)):
        stepper = stepper_of(LLAMA, "float32", fuse=True)
        stepper.step(PROMPTS)
        launched.clear()
        stepper.step([[8], [5], [9]])
    assert launched == ["rms_norm_kernel", *LAYER, *LAYER]


def test_on_host_ends_with_its_block() -> None:
    assert (launching.unavailable() is None) is on_gpu
    with launching.on_host(lambda kernel: lambda grid, block, args: None):
        assert launching.unavailable() is None
        assert launching.takes(np.zeros(1))
    assert not launching.takes(np.zeros(1))
