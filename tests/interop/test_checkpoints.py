"""Checkpoints made on the spot: each form that is read, and each way in which one can be broken."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models

from paged_ref import LLM, SamplingParams
from paged_ref.core.device import to_host
from paged_ref.core.model import loading
from paged_ref.extras import memory_limit
from paged_ref.extras.formatted_kv import FormattedKV
from paged_ref.interop.architectures import build_model, random_weights, weight_shapes
from paged_ref.interop.checkpoints import CheckpointError, load
from paged_ref.interop.hf_config import config_from_hf
from paged_ref.timeline.events import Event, TokenNamed

HF: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
WEIGHTS = random_weights(config_from_hf(HF), seed=5)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A whole checkpoint, for a test to break."""
    write_json(tmp_path / "config.json", HF)
    save_file(WEIGHTS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_shards(directory: Path) -> None:
    """The same weights in three files and an index."""
    (directory / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for n in range(3):
        shard = f"model-{n + 1:05}-of-00003.safetensors"
        part = {name: WEIGHTS[name] for i, name in enumerate(WEIGHTS) if i % 3 == n}
        save_file(part, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_bfloat16(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """The safetensors format by hand, since NumPy has no bfloat16: the upper half of each float32."""
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        raw = (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": array.shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 GB, whichever this one is."""
    monkeypatch.setattr(memory_limit, "machine_memory", lambda: 16_000_000_000)
    monkeypatch.setattr(memory_limit, "gpu_memory", lambda: 16_000_000_000)


def assert_refused(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        load(directory)
    assert "\n" not in str(caught.value)


def test_float32(directory: Path) -> None:
    checkpoint = load(str(directory))
    assert checkpoint.config == config_from_hf(HF)
    assert checkpoint.tokenizer.encode("b") == [1]
    assert set(checkpoint.weights) == set(WEIGHTS)
    assert len(checkpoint.weights) == len(WEIGHTS)
    for name, array in WEIGHTS.items():
        assert checkpoint.weights[name].dtype == np.float32
        np.testing.assert_array_equal(checkpoint.weights[name], array)


def test_float16(directory: Path) -> None:
    half = {name: array.astype(np.float16) for name, array in WEIGHTS.items()}
    save_file(half, directory / "model.safetensors")
    weights = load(directory).weights
    for name, array in half.items():
        np.testing.assert_array_equal(weights[name], array)
    assert build_model(config_from_hf(HF), weights).embedding.dtype == np.float32


def test_bfloat16(directory: Path) -> None:
    write_bfloat16(directory / "model.safetensors", WEIGHTS)
    weights = load(directory).weights
    for name, array in WEIGHTS.items():
        assert weights[name].dtype == np.float32
        np.testing.assert_allclose(weights[name], array, rtol=2**-7)  # 8 bits of mantissa, cut off
        assert not (weights[name].view(np.uint32) & 0xFFFF).any()


def test_shards(directory: Path) -> None:
    write_shards(directory)
    weights = load(directory).weights
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(weights[name], array)


def test_a_tied_checkpoint_needs_no_head_and_may_keep_one(directory: Path) -> None:
    write_json(directory / "config.json", {**HF, "tie_word_embeddings": True})
    tied = {k: v for k, v in WEIGHTS.items() if k != "lm_head.weight"}
    for weights in (tied, {**tied, "lm_head.weight": WEIGHTS["model.embed_tokens.weight"].copy()}):
        save_file(weights, directory / "model.safetensors")
        checkpoint = load(directory)
        model = build_model(checkpoint.config, checkpoint.weights)
        assert model.head is model.embedding


def test_a_tied_checkpoint_with_another_head_is_refused(directory: Path) -> None:
    write_json(directory / "config.json", {**HF, "tie_word_embeddings": True})
    said = (
        "tie_word_embeddings is true, and lm_head.weight is another table than model.embed_tokens.weight; if the model"
    )
    assert_refused(directory, said)
    save_file({**WEIGHTS, "lm_head.weight": WEIGHTS["lm_head.weight"][:3]}, directory / "model.safetensors")
    assert_refused(directory, said)


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_checkpoint_may_store_its_table_under_either_name(directory: Path, kept: str) -> None:
    table = WEIGHTS["lm_head.weight"]
    others = {k: v for k, v in WEIGHTS.items() if k not in ("lm_head.weight", "model.embed_tokens.weight")}
    save_file({**others, kept: table}, directory / "model.safetensors")
    assert_refused(directory, "has no tensor ")  # not tied
    write_json(directory / "config.json", {**HF, "tie_word_embeddings": True})
    checkpoint = load(directory)
    model = build_model(checkpoint.config, checkpoint.weights)
    np.testing.assert_array_equal(to_host(model.embedding), table)
    assert model.head is model.embedding


def test_a_base_models_names_have_no_prefix(directory: Path) -> None:
    base = {name.removeprefix("model."): array for name, array in WEIGHTS.items() if name != "lm_head.weight"}
    save_file(base, directory / "model.safetensors")
    assert_refused(directory, "has no tensor lm_head.weight; the config wants one of shape [20, 8]")
    write_json(directory / "config.json", {**HF, "tie_word_embeddings": True})
    weights = load(directory).weights
    assert set(weights) == set(WEIGHTS) - {"lm_head.weight"}
    np.testing.assert_array_equal(weights[Q_PROJ], WEIGHTS[Q_PROJ])
    save_file({k: v for k, v in base.items() if k != Q_PROJ.removeprefix("model.")}, directory / "model.safetensors")
    assert_refused(directory, "has no tensor layers.1.self_attn.q_proj.weight; the config wants one of shape [8, 8]")


def joined(weights: dict[str, np.ndarray], *names: str) -> np.ndarray:
    return np.concatenate([weights.pop(name) for name in names])


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_joined_tensors_are_taken_apart(directory: Path, stored: str) -> None:
    weights = dict(WEIGHTS)
    for at in ("model.layers.0", "model.layers.1"):
        qkv = joined(weights, *(f"{at}.self_attn.{name}_proj.weight" for name in "qkv"))
        gate_up = joined(weights, *(f"{at}.mlp.{name}_proj.weight" for name in ("gate", "up")))
        weights |= {f"{at}.self_attn.qkv_proj.weight": qkv, f"{at}.mlp.gate_up_proj.weight": gate_up}
    write = save_file if stored == "float32" else lambda tensors, path: write_bfloat16(path, tensors)
    write(weights, directory / "model.safetensors")
    write_json(directory / "config.json", {**HF, "model_type": "phi3"})
    loaded = load(directory).weights
    assert set(loaded) == set(WEIGHTS)
    for name, array in WEIGHTS.items():
        np.testing.assert_allclose(loaded[name], array, rtol=2**-7 if stored == "bfloat16" else 0)
    write_json(directory / "config.json", {**HF, "model_type": "phi3", "num_key_value_heads": 2})
    assert_refused(directory, "model.layers.0.self_attn.qkv_proj.weight has shape [16, 8]; the config wants [24, 8]")


GPT2: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32,
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2s_matrices_lie_transposed(directory: Path, prefix: str) -> None:
    want = random_weights(config_from_hf(GPT2), seed=2)
    rest, stored = dict(want), {}
    for name, whole in (("embed_tokens.weight", "wte.weight"), ("position_embeddings.weight", "wpe.weight")):
        stored[whole] = rest.pop(f"model.{name}")
    for kind in ("weight", "bias"):
        stored[f"ln_f.{kind}"] = rest.pop(f"model.norm.{kind}")
        for n in range(2):
            at = f"model.layers.{n}"
            parts = {
                "attn.c_attn": joined(rest, *(f"{at}.self_attn.{name}_proj.{kind}" for name in "qkv")).T,
                "attn.c_proj": rest.pop(f"{at}.self_attn.o_proj.{kind}").T,
                "mlp.c_fc": rest.pop(f"{at}.mlp.up_proj.{kind}").T,
                "mlp.c_proj": rest.pop(f"{at}.mlp.down_proj.{kind}").T,
                "ln_1": rest.pop(f"{at}.input_layernorm.{kind}"),
                "ln_2": rest.pop(f"{at}.post_attention_layernorm.{kind}"),
            }
            stored |= {f"h.{n}.{name}.{kind}": np.ascontiguousarray(part) for name, part in parts.items()}
    assert not rest
    stored["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)  # the causal mask, in old files
    save_file({prefix + name: array for name, array in stored.items()}, directory / "model.safetensors")
    write_json(directory / "config.json", GPT2)
    weights = load(directory).weights
    assert set(weights) == set(want)
    for name, array in want.items():
        np.testing.assert_array_equal(weights[name], array)
    with pytest.raises(ValueError, match="max_model_len is 40; a gpt2 model has vectors for the 32 positions"):
        LLM(directory, max_model_len=40, beyond_context=True)


def test_a_model_with_a_softcap_runs_where_attention_has_one(directory: Path) -> None:
    gemma = {**HF, "model_type": "gemma2", "tie_word_embeddings": True, "head_dim": 4, "attn_logit_softcapping": 0.2}
    write_json(directory / "config.json", gemma)
    save_file(random_weights(config_from_hf(gemma), seed=5), directory / "model.safetensors")
    with pytest.raises(ValueError, match="device_blocks is 8; streamed attention has no softcap, which this model"):
        LLM(directory, device_blocks=8)
    llm = LLM(directory, backend="reference", kv_dtype="int8")
    llm.generate([[3, 4, 5]], SamplingParams(max_tokens=2))
    kv = llm.engine.kv
    assert isinstance(kv, FormattedKV)
    assert [str(variant) for variant in kv.variants] == ["softcap, key_scales, value_scales"] * 2


def test_frequencies_in_old_files_are_passed_over(directory: Path) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    save_file(WEIGHTS | old, directory / "model.safetensors")
    load(directory)


def test_generation_config_decides_about_eos(directory: Path) -> None:
    assert load(directory).config.eos_token_ids == (2,)
    write_json(directory / "generation_config.json", {"temperature": 0.6})
    assert load(directory).config.eos_token_ids == (2,)
    write_json(directory / "generation_config.json", {"eos_token_id": [3, 4]})
    assert load(directory).config.eos_token_ids == (3, 4)


def test_tiny_is_the_embedded_checkpoint_and_the_same_as_the_cores() -> None:
    checkpoint, cores = load("tiny"), loading.load("tiny")
    for field in fields(cores.config):
        assert getattr(checkpoint.config, field.name) == getattr(cores.config, field.name)
    assert checkpoint.weights.keys() == cores.weights.keys()
    for name, array in cores.weights.items():
        np.testing.assert_array_equal(checkpoint.weights[name], array)
    build_model(checkpoint.config, checkpoint.weights)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "nowhere is not a directory; a checkpoint in Hugging Face form is needed")


def test_a_missing_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    assert_refused(directory, "config.json is missing")


def test_a_checkpoint_without_a_tokenizer_serves_token_ids(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    events: list[Event] = []
    llm = LLM(directory, backend="reference", log=events.append)
    (output,) = llm.generate([[3, 4, 5]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 4
    assert output.outputs[0].text == ""
    assert TokenNamed(3, "<3>") in events
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; token ids are needed in place of 'Once'"):
        llm.generate("Once")
    with pytest.raises(ValueError, match=r"stop is \('a',\).* has no tokenizer\.json"):
        llm.generate([[3]], SamplingParams(stop=("a",)))
    assert not llm.has_unfinished


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "is not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"\xff", "is not text in UTF-8: byte 0 is wrong"),
        (b"[1]", "holds a list; a JSON object is needed"),
        (b"[" * 1000 + b"]" * 1000, "is not JSON: nested more than 100 deep at column 101"),
        (
            b'{"vocab_size":\n 1' + b"0" * 400 + b"}",
            "is not JSON: a number that needs more than 64 bits at line 2, column 2",
        ),
    ],
    ids=["cut", "bytes", "list", "nested", "huge"],
)
def test_a_file_that_is_not_a_json_object(directory: Path, name: str, raw: bytes, message: str) -> None:
    (directory / name).write_bytes(raw)
    assert_refused(directory, f"{name} {message}")


def test_a_broken_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    assert_refused(directory, "tokenizer.json is not a tokenizer: ")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "bert"}, "config.json: model_type is 'bert'; known are llama, mistral, qwen2, qwen3"),
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"num_attention_heads": 3}, "config.json: hidden_size is 8; without head_dim a multiple of the 3"),
        (
            {"num_hidden_layers": 3},
            "has no tensor model.layers.2.self_attn.q_proj.weight; the config wants one of shape [8, 8]",
        ),
        ({"num_hidden_layers": 1}, "has a tensor model.layers.1."),
        ({"model_type": "qwen2"}, "has no tensor model.layers.0.self_attn.q_proj.bias; the config wants one"),
        (
            {"intermediate_size": 16},
            "model.layers.0.mlp.gate_proj.weight has shape [12, 8]; the config wants [16, 8]",
        ),
        ({"vocab_size": 21}, "model.embed_tokens.weight has shape [20, 8]; the config wants [21, 8]"),
        (
            {"num_hidden_layers": 10**9},
            "config.json: num_hidden_layers is 1000000000, which needs 65,536.0 GB; this machine has 16.0 GB",
        ),
        (
            {"hidden_size": 10**5, "intermediate_size": 10**6},
            "config.json: a model of this size needs 1,320.0 GB; this machine has 16.0 GB",
        ),
        ({"vocab_size": 2**31}, "config.json: vocab_size is 2147483648; an integer of at most 2147483647 is needed"),
    ],
)
def test_a_config_that_does_not_fit(directory: Path, keys: dict[str, Any], message: str) -> None:
    write_json(directory / "config.json", {**HF, **keys})
    assert_refused(directory, message)


def test_an_eos_that_is_no_token_id(directory: Path) -> None:
    write_json(directory / "generation_config.json", {"eos_token_id": "</s>"})
    assert_refused(directory, "generation_config.json: eos_token_id is '</s>'; a token id or a list of them")


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert_refused(directory, "has neither model.safetensors nor model.safetensors.index.json")
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert_refused(directory, "pytorch_model.bin is pickled, which is not read: save it as safetensors")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(directory: Path, keep: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(directory, "model.safetensors is not a whole safetensors file: ")


def test_a_header_that_is_not_one(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert_refused(directory, "model.safetensors is not a whole safetensors file: ")


def test_a_missing_tensor(directory: Path) -> None:
    save_file({k: v for k, v in WEIGHTS.items() if k != Q_PROJ}, directory / "model.safetensors")
    assert_refused(directory, f"has no tensor {Q_PROJ}; the config wants one of shape [8, 8]")


def test_a_tensor_that_the_model_has_no_place_for(directory: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    save_file(WEIGHTS | {name: np.ones(8, np.float32)}, directory / "model.safetensors")
    assert_refused(directory, f"has a tensor {name}; a llama model has no place for it")


def test_a_dtype_that_is_not_read(directory: Path) -> None:
    save_file(WEIGHTS | {Q_PROJ: WEIGHTS[Q_PROJ].astype(np.float64)}, directory / "model.safetensors")
    assert_refused(directory, f"{Q_PROJ} has dtype F64; known are F32, F16, BF16")


def test_a_missing_shard(directory: Path) -> None:
    write_shards(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert_refused(directory, "model-00002-of-00003.safetensors is missing; model.safetensors.index.json names it")


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/elsewhere.safetensors", "a/b.safetensors", "..", "", "a\x00.safetensors"]
)
def test_a_shard_is_the_plain_name_of_a_file(directory: Path, name: str) -> None:
    (directory / "model.safetensors").rename(directory.parent / "elsewhere.safetensors")
    write_json(directory / "model.safetensors.index.json", {"weight_map": dict.fromkeys(WEIGHTS, name)})
    assert_refused(directory, f"index.json names the shard {name!r}; the plain name of a file is needed")


def test_a_shard_may_be_a_link_inside_the_directory_and_none_that_leaves_it(directory: Path) -> None:
    target, name = directory.parent / "elsewhere.safetensors", "model-00001-of-00001.safetensors"
    (directory / "model.safetensors").rename(target)
    write_json(directory / "model.safetensors.index.json", {"weight_map": dict.fromkeys(WEIGHTS, name)})
    (directory / name).symlink_to(target)
    assert_refused(directory, f"{name} is a link to {target.resolve()}; model.safetensors.index.json may name files of")
    (directory / name).unlink()
    target.rename(directory / "weights")
    (directory / name).symlink_to("weights")
    load(directory)


def test_the_links_of_the_hubs_cache_are_followed(directory: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    write_shards(directory)
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in [path for path in directory.iterdir() if path.is_file()]:
        file.rename(blobs / f"hash of {file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash of {file.name}")
    assert len(load(snapshot).weights) == len(WEIGHTS)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["zero", "fifo"])
def test_a_device_or_a_pipe_is_not_read(directory: Path, name: str, kind: str) -> None:
    path = directory / name
    path.unlink(missing_ok=True)
    if kind == "zero":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    assert_refused(directory, f"{name} cannot be read: it is a pipe or a device; a regular file is needed")


def test_a_config_that_is_too_long_is_not_read(directory: Path) -> None:
    with (directory / "config.json").open("wb") as file:
        file.truncate(10**13)  # a hole: it takes no place on the disk
    assert_refused(directory, "config.json has 10000000000000 bytes; at most 67108864 are read")


def test_a_truncated_shard(directory: Path) -> None:
    write_shards(directory)
    shard = directory / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    assert_refused(directory, "model-00003-of-00003.safetensors is not a whole safetensors file: ")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 3}}])
def test_an_index_without_a_map(directory: Path, index: dict[str, Any]) -> None:
    (directory / "model.safetensors").unlink()
    write_json(directory / "model.safetensors.index.json", index)
    assert_refused(directory, "model.safetensors.index.json has no weight_map of tensor names to file names")


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loading_takes_little_more_memory_than_the_weights(directory: Path, stored: str, dtype: str) -> None:
    hf = HF | {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 1024, "tie_word_embeddings": True}
    weights = random_weights(config_from_hf(hf))
    write_json(directory / "config.json", hf)
    if stored == "bfloat16":
        write_bfloat16(directory / "model.safetensors", weights)
    else:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    checkpoint = load(directory)
    tracemalloc.start()
    try:
        model = build_model(checkpoint.config, checkpoint.weights, dtype)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = np.dtype(dtype).itemsize
    sizes = [size * array.size for array in weights.values()]
    assert peak <= 1.1 * sum(sizes) + max(sizes)
    assert model.embedding.nbytes == max(sizes)


# Sizes of a model of 135 million parameters with tied embeddings (SmolLM2's), and of one of 500 million without.
SMALL = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
LARGE = {
    "vocab_size": 65536, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
LOAD = """
import resource, sys
from paged_ref.interop.architectures import build_model
from paged_ref.interop.checkpoints import load
load("tiny")
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
checkpoint = load(sys.argv[1])
model = build_model(checkpoint.config, checkpoint.weights)
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems count resident memory in other units")
@pytest.mark.parametrize("stored", ["F32", "BF16"])
@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["135M", "500M"])
def test_a_real_model_is_read_without_a_second_copy(directory: Path, sizes: dict[str, Any], stored: str) -> None:
    """The peak of resident memory, mapped files included, in a process that loads a file of zeros (a hole)."""
    write_json(directory / "config.json", HF | sizes)
    width, end, header = 4 if stored == "F32" else 2, 0, {}
    shapes = weight_shapes(config_from_hf(HF | sizes))
    for name, shape in shapes.items():
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [end, end + width * math.prod(shape)]}
        end += width * math.prod(shape)
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    run = subprocess.run([sys.executable, "-c", LOAD, str(directory)], capture_output=True, text=True, check=True)
    loaded = [4 * math.prod(shape) for shape in shapes.values()]
    assert sum(loaded) <= int(run.stdout) <= 1.1 * sum(loaded) + max(loaded)
