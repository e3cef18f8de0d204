"""Known GPUs: names as people and drivers write them, and numbers that hang together."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from paged_ref.core import device
from paged_ref.planner.hardware import GPUS, gpu_named, gpu_of_driver, several


@pytest.mark.parametrize(
    ("written", "name"),
    [("A100-40GB", "A100-40GB"), ("h100 sxm", "H100-SXM"), ("rtx4090", "RTX-4090"), (" l4 ", "L4"), ("L40s", "L40S")],
)
def test_a_name_is_found_however_it_is_written(written: str, name: str) -> None:
    assert gpu_named(written).name == name


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"gpu is 'A100'; known are auto, A100-40GB, A100-80GB, .*MI300X"):
        gpu_named("A100")


def test_the_numbers_have_the_right_size() -> None:
    """A slip of a unit or a doubled datasheet figure would leave these bands."""
    for gpu in GPUS.values():
        assert 16 * 2**30 <= gpu.memory_bytes <= 256 * 2**30, gpu.name
        assert 3e11 <= gpu.bandwidth <= 8e12, gpu.name
        assert 60 <= gpu.flops / gpu.bandwidth <= 430, gpu.name  # operations for each byte at the ridge
        assert gpu.link in (16e9, 32e9, 64e9), gpu.name
        assert gpu.peer == gpu.link or 150e9 <= gpu.peer <= 900e9, gpu.name  # no NVLink, or one direction of it
        assert re.search(r", 20\d\d-\d\d-\d\d$", gpu.source), gpu.name


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("Tesla T4", "T4"),
    ],
)
def test_the_driver_s_name_is_found(driver: str, name: str) -> None:
    assert gpu_of_driver(driver).name == name


@pytest.mark.parametrize(
    "driver", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "GeForce GTX 980"]
)
def test_a_relative_is_not_taken_for_the_chip(driver: str) -> None:
    with pytest.raises(ValueError, match=r"this machine has a .* whose datasheet is not in the table"):
        gpu_of_driver(driver)


def test_auto_reads_name_and_memory_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = {"name": b"NVIDIA L4", "totalGlobalMem": 23 * 10**9}
    runtime = SimpleNamespace(getDeviceProperties=lambda number: properties)
    monkeypatch.setattr(device, "on_gpu", True)
    monkeypatch.setattr(device, "xp", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    gpu = gpu_named("AUTO")
    assert (gpu.name, gpu.memory_bytes, gpu.bandwidth) == ("L4", 23 * 10**9, 300e9)


@pytest.mark.skipif(device.on_gpu, reason="a GPU is in use")
def test_auto_without_a_gpu_says_why() -> None:
    with pytest.raises(ValueError, match=r"gpu is 'auto'; .*\. Name one: known are A100-40GB"):
        gpu_named("auto")


def test_several_add_up() -> None:
    one, four = GPUS["L4"], several(GPUS["L4"], 4)
    assert (four.memory_bytes, four.bandwidth, four.flops, four.link) == tuple(
        4 * rate for rate in (one.memory_bytes, one.bandwidth, one.flops, one.link)
    )
    assert (four.peer, four.count) == (one.peer, 4)
    assert several(one, 1) is one
    with pytest.raises(ValueError, match="num_gpus is 0; at least 1"):
        several(one, 0)
