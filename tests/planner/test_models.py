"""Models in numbers: held against published parameter counts and the paper's own arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paged_ref.core.model.config import kv_bytes_per_token
from paged_ref.core.model.loading import TINY
from paged_ref.interop.checkpoints import load
from paged_ref.planner.models import MODELS, model_named

# As the hub lists them for the published safetensors.
PUBLISHED = {
    "OPT-13B": 12_853_473_280,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-8B": 8_190_735_360,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_count(name: str) -> None:
    assert MODELS[name].num_parameters == PUBLISHED[name]


def test_opt_175b_has_the_weights_of_the_paper() -> None:
    """Table 1 of the paper: 346 GB for OPT-175B, 132 GB for OPT-66B, 26 GB for OPT-13B."""
    for name, gigabytes in (("OPT-175B", 346), ("OPT-66B", 132), ("OPT-13B", 26)):
        assert MODELS[name].weight_bytes / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_kv_bytes_show_their_arithmetic() -> None:
    """800 KB for each token of OPT-13B (paper, §3): 2 x 5120 x 40 x 2 bytes."""
    opt = model_named("opt-13b")
    assert opt.kv_bytes_per_token == 2 * 5120 * 40 * 2 == 800 * 1024
    assert opt.kv_arithmetic == "2 (K and V) x 40 layers x 40 KV heads x 128 x 2 bytes = 819,200 bytes"


def test_the_embedded_model_is_the_one_that_the_engine_loads() -> None:
    spec, checkpoint = model_named("tiny"), load("tiny")
    assert spec.num_parameters == sum(array.size for array in checkpoint.weights.values())
    assert spec.kv_bytes_per_token == kv_bytes_per_token(checkpoint.config, "float32")


def test_a_directory_needs_only_its_config(tmp_path: Path) -> None:
    hf = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | {"num_hidden_layers": 3}))
    spec = model_named(tmp_path)
    assert (spec.name, spec.num_layers, spec.weight_bits) == (tmp_path.name, 3, 16)
    (tmp_path / "config.json").write_text(json.dumps(hf | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'gpt2'; known are llama"):
        model_named(tmp_path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="model is 'GPT-5'; a Hugging Face directory or one of tiny, OPT-13B, "):
        model_named("GPT-5")
