"""Models of transformers with paged attention: the tokens of eager attention with the default cache, or a refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra `compare` (torch, transformers) is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `compare` is not installed")

from paged_ref.core.memory.block_pool import OutOfBlocks  # noqa: E402
from paged_ref.interop import kernel_api  # noqa: E402
from paged_ref.interop.huggingface import PagedCache, attention, register  # noqa: E402

pytestmark = [
    pytest.mark.compare,
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.4,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
WINDOW = {"sliding_window": 7}  # shorter than the prompts
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
UNTIED = {"tie_word_embeddings": False}  # with random weights, a tied head says the last token again
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, **UNTIED}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 20, **WINDOW, **UNTIED}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", WINDOW),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"attn_logit_softcapping": 3.0, **GEMMA}),
    "gemma3": ("Gemma3", GEMMA),
    "phi3": ("Phi3", WINDOW),
    "phimoe": ("Phimoe", {**EXPERTS, **WINDOW}),
    "gpt_oss": ("GptOss", {"head_dim": 8, **EXPERTS, **WINDOW}),
    "gpt2": ("GPT2", GPT2),
}
PROMPTS = torch.tensor([
    [0, 0, 0, 0, 0, 0, 5, 9, 33, 2], [1, 20, 21, 22, 23, 24, 25, 26, 27, 28], [0, 0, 0, 0, 3, 7, 8, 9, 10, 3],
])  # fmt: skip
MASK = (PROMPTS != 0).long()  # lengths 4, 10 and 6, padded on the left
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    register()


def build(family: str, **keys: Any) -> Any:
    """A model of random weights, so large that each part of its attention moves the tokens."""
    name, own = FAMILIES.get(family, (family, {}))
    config_name = f"{name}TextConfig" if name.startswith(("Gemma3", "Gemma4")) else f"{name}Config"
    config = getattr(transformers, config_name)(**SIZES | own | keys)
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    model_name = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, model_name)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms, biases and sinks begin at 0 and 1, where a mistake would not show
                parameter += (3.0 if "sinks" in parameter_name else 0.2) * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    return model


def generate(model: Any, prompts: Any = PROMPTS, mask: Any = MASK, *, new: int = 20, **how: Any) -> Any:
    torch.manual_seed(6)  # of a few seeds, one draws a number that rounding can decide
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0} | how
    return model.generate(prompts, attention_mask=mask, **options)


def paged(model: Any) -> Any:
    model.set_attn_implementation("paged_ref")
    return model


def cache_of(num_blocks: int = 200, block_size: int = 4, **how: Any) -> PagedCache:
    return PagedCache(num_blocks, block_size, **how)


# --- the same tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_eager_attention(family: str, way: str) -> None:
    model = build(family)
    expected = generate(model, **WAYS[way])
    cache = cache_of()
    assert torch.equal(generate(paged(model), past_key_values=cache, **WAYS[way]), expected)
    assert len(set(expected[:, PROMPTS.shape[1] :].flatten().tolist())) > 15  # a model that says something
    cache.pool.manager.check_integrity()


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 8}),
        *((family, {"sliding_window": 128}) for family in FAMILIES if "sliding_window" in FAMILIES[family][1]),
    ],
)  # fmt: skip
def test_softcap_scale_and_windows_each_change_a_token(family: str, without: dict[str, Any]) -> None:
    assert not torch.equal(generate(build(family)), generate(build(family, **without)))


def test_sinks_change_a_token() -> None:
    model = build("gpt_oss")
    before = generate(model)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-50.0)
    assert not torch.equal(generate(model), before)


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_any_block_size_gives_the_same_tokens(block_size: int) -> None:
    model = build("gemma2")
    expected = generate(model)
    assert torch.equal(generate(paged(model), cache=cache_of(128, block_size)), expected)


def test_prompt_lookup_and_assisted_decoding_take_back_rejected_tokens() -> None:
    model, assistant = build("qwen2"), build("qwen2", num_hidden_layers=1)
    prompt = torch.tensor([[1, 20, 21, 22, 23, 20, 21, 22, 24, 20, 21]])
    mask = torch.ones_like(prompt)
    expected = generate(model, prompt, mask, new=30)
    for how in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant}):
        cache = cache_of()
        assert torch.equal(generate(paged(model), prompt, mask, new=30, past_key_values=cache, **how), expected)
        assert cache.blocks_in_use == -(-cache.get_seq_length() // 4)
        cache.pool.manager.check_integrity()


def test_a_long_prompt_in_chunks() -> None:
    model = build("mistral")
    expected = generate(model)
    assert torch.equal(generate(paged(model), past_key_values=cache_of(), prefill_chunk_size=3), expected)


def test_layers_that_share_k_and_v() -> None:
    sizes = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8}
    more = {"layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 96}
    model = build("Gemma4", **sizes, **more, **WINDOW)
    expected = generate(model)
    cache = cache_of()
    assert torch.equal(generate(paged(model), past_key_values=cache), expected)
    assert len(cache) == 2
