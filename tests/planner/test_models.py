"""Models in numbers: held against published parameter counts and the paper's own arithmetic."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from paged_ref.core.model.config import kv_bytes_per_token
from paged_ref.core.model.loading import TINY
from paged_ref.interop.checkpoints import load
from paged_ref.planner.model_config import spec_of_config
from paged_ref.planner.models import MODELS, ByHand, model_named, with_windows
from paged_ref.planner.traces import TraceRequest

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
    "Mixtral-8x7B": 46_702_792_704,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-2-27B": 27_227_128_320,
    "Phi-4": 14_659_507_200,
    "Mistral-Small-24B": 23_572_403_200,
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
    del hf["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=r"config\.json: num_hidden_layers is missing \(other names: n_layer"):
        model_named(tmp_path)


def test_the_index_of_a_checkpoint_has_the_bytes_of_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 2400000}}')
    assert model_named(tmp_path).weight_bytes == 2_400_000


# --- any architecture, by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        ("Llama-3.1-70B", 2 * 80 * 8 * 128 * 2),  # 320 KiB: K and V, layers, KV heads, head size, bytes
        ("DeepSeek-V3", 61 * (512 + 64) * 2),  # the latent and the key that RoPE turns: 70,272
        ("Gemma-3-27B", 2 * 62 * 16 * 128 * 2),
        ("gpt-oss-20b", 2 * 24 * 8 * 64 * 2),
        ("Qwen3-235B-A22B", 2 * 94 * 4 * 128 * 2),
    ],
)
def test_kv_bytes_of_a_token(name: str, kv_bytes: int) -> None:
    assert MODELS[name].full_kv_bytes == MODELS[name].kv_bytes_per_token == kv_bytes
    assert MODELS[name].kv_arithmetic.endswith(f"= {kv_bytes:,} bytes")


def test_the_latent_shows_its_arithmetic() -> None:
    assert MODELS["DeepSeek-V3"].kv_arithmetic == "61 layers x 576 of the latent x 2 bytes = 70,272 bytes"


def test_active_weights_of_experts() -> None:
    """Mixtral (Jiang et al. 2024): 47B weights, 13B for a token: 2 of 8 experts of 3 x 4096 x 14336 in 32 layers."""
    mixtral = MODELS["Mixtral-8x7B"]
    expert = 3 * 4096 * 14336
    assert mixtral.num_routed == 32 * 8 * expert
    assert mixtral.num_active == 46_702_792_704 - 32 * 6 * expert == 12_879_925_248
    # DeepSeek-V3: its weights' README says 671B in all, 36.6B for a token, the matrix of the logits among these and
    # the embedding not. 58 of 61 layers have 256 experts and one for all tokens.
    deepseek = MODELS["DeepSeek-V3"]
    embedding = 129_280 * 7168
    assert deepseek.num_parameters / 1e9 == pytest.approx(671, abs=0.5)
    assert deepseek.num_routed == 58 * 256 * 3 * 7168 * 2048
    assert (deepseek.num_active - embedding) / 1e9 == pytest.approx(36.6, abs=0.05)
    assert deepseek.weight_bits == 8
    for name, total, active in (("Qwen3-30B-A3B", 30.5, 3.3), ("Qwen3-235B-A22B", 235, 22), ("Llama-4-Scout", 109, 17),
                                ("gpt-oss-120b", 117, 5.1), ("Kimi-K2", 1000, 32)):  # fmt: skip
        spec = MODELS[name]
        assert spec.num_parameters / 1e9 == pytest.approx(total, rel=0.03), name
        met = (spec.num_active - spec.num_looked_up) / 1e9  # publishers count the embedding or not
        assert met == pytest.approx(active, rel=0.1), name


def test_windows_by_layer() -> None:
    """Gemma 2 alternates; in Gemma 3 every sixth layer sees everything, in Llama 4 every fourth."""
    counts = {name: (MODELS[name].window, MODELS[name].num_windowed_layers) for name in
              ("Gemma-2-9B", "Gemma-3-27B", "Llama-4-Scout", "gpt-oss-20b", "Llama-3-8B")}  # fmt: skip
    assert counts == {
        "Gemma-2-9B": (4096, 21), "Gemma-3-27B": (1024, 62 - 10), "Llama-4-Scout": (8192, 36),
        "gpt-oss-20b": (128, 12), "Llama-3-8B": (None, 0),
    }  # fmt: skip
    gemma = MODELS["Gemma-3-27B"]
    layer = 2 * 16 * 128 * 2  # bytes of a token
    assert gemma.kept(1000) == 62 * layer * 1000
    assert gemma.kept(8192) == 10 * layer * 8192 + 52 * layer * 1024


def test_what_windows_keep_is_a_mean_over_the_time_of_the_sequences() -> None:
    gemma = MODELS["Gemma-3-27B"]
    requests = [TraceRequest(0.0, 1000, 200), TraceRequest(0.0, 8000, 50), TraceRequest(0.0, 10, 3)]
    lengths = [each.prompt_len + i for each in requests for i in range(each.output_len)]
    kept = sum(gemma.kept(length) for length in lengths) / (gemma.full_kv_bytes * sum(lengths))
    assert with_windows(gemma, requests).kv_share == pytest.approx(kept)
    assert 0.2 < kept < 0.6
    assert with_windows(MODELS["Llama-3-8B"], requests) is MODELS["Llama-3-8B"]


def test_layers_that_share_or_have_no_k_and_v() -> None:
    base = {
        "model_type": "x", "num_hidden_layers": 32, "hidden_size": 64, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 1000,
    }  # fmt: skip
    token = 2 * 4 * 16 * 2  # bytes in a layer
    for extra, layers in (
        ({}, 32),
        ({"num_kv_shared_layers": 12}, 20),
        ({"use_cla": True, "cla_share_factor": 2}, 16),
        ({"full_attention_interval": 4}, 8),
        ({"attn_layer_period": 8, "attn_layer_offset": 4}, 4),
        ({"hybrid_override_pattern": "M-M*" * 8}, 8),
        ({"layer_types": ["linear_attention", "full_attention"] * 16}, 16),
    ):
        assert spec_of_config(base | extra, "x").full_kv_bytes == layers * token, extra
    nested = {"model_type": "gemma3", "text_config": base, "vision_config": {}}
    assert spec_of_config(nested, "x").num_layers == 32
    old = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024, "model_type": "gpt2"}
    assert spec_of_config(old, "gpt2").full_kv_bytes == 2 * 12 * 768 * 2
    assert spec_of_config(old | {"multi_query": True}, "x").full_kv_bytes == 2 * 12 * 64 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; an integer of 1 to"),
        ({"hidden_size": 10**20}, "hidden_size is 1"),
        ({"vocab_size": "many"}, "vocab_size is many; an integer"),
        ({"hidden_size": 65}, "hidden_size is 65; without head_dim a multiple of the 4 heads"),
        ({"layer_types": ["full_attention"]}, "layer_types has to be a list of 32 kinds"),
        ({"num_kv_shared_layers": 32}, "num_kv_shared_layers is 32; fewer than the 32 layers"),
        ({"num_experts": 4}, "num_experts_per_tok is missing"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "a token uses 5 of 4 experts"),
        ({"kv_lora_rank": 512}, "qk_rope_head_dim is missing"),
    ],
)
def test_a_wrong_config_names_its_key(change: dict[str, object], message: str) -> None:
    config = {
        "num_hidden_layers": 32, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128,
        "vocab_size": 100, "max_position_embeddings": 1000,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        spec_of_config(config | change, "x")


def test_numbers_by_hand() -> None:
    spec = ByHand(kv_bytes=70_272, weights=671e9, active_weights=37e9, layers=61).model()
    assert (spec.kv_bytes_per_token, spec.num_parameters, spec.num_active) == (70_272, 671 * 10**9, 37 * 10**9)
    with pytest.raises(ValueError, match="a model by hand needs --weights and --layers too"):
        ByHand(kv_bytes=1).model()
    with pytest.raises(ValueError, match="--active-weights is 9,000,000,000; 1 to all 8,030,261,248 weights"):
        ByHand(active_weights=9e9).change(MODELS["Llama-3-8B"])
    half = ByHand(layers=16).change(MODELS["Llama-3-8B"])
    assert half.kv_bytes_per_token == 65_536
    ends = 2 * 128_256 * 4096
    assert half.num_parameters == ends + (8_030_261_248 - ends) // 2
    assert ByHand(kv_bytes=1000).change(MODELS["Llama-3-8B"]).kv_arithmetic == "1,000 bytes, as given"
    mixtral = ByHand(weights=10e9).change(MODELS["Mixtral-8x7B"])
    assert mixtral.num_active == pytest.approx(10e9 * 12.88 / 46.7, rel=1e-3)


def test_every_model_has_its_source_and_its_date() -> None:
    for spec in MODELS.values():
        assert re.fullmatch(r".+, 20\d\d-\d\d-\d\d", spec.source), spec.name
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", spec.hub), spec.name
        assert model_named(spec.hub) is spec


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="model is 'GPT-5'; a Hugging Face directory or one of tiny, OPT-13B, "):
        model_named("GPT-5")
