"""Models of transformers with paged attention: the tokens of eager attention with the default cache, or a refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra `compare` (torch, transformers) is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `compare` is not installed")

from paged_ref.core.attention.attention import AttentionCall, attend  # noqa: E402
from paged_ref.core.memory.block_pool import OutOfBlocks  # noqa: E402
from paged_ref.extras import memory_limit  # noqa: E402
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
SHARED = {  # two of the layers read K and V of the two others
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
}  # fmt: skip
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
    config_name = f"{name}TextConfig" if name.startswith(("Gemma3", "Gemma4", "Llama4")) else f"{name}Config"
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


def test_rows_that_end_early() -> None:
    model = build("llama")
    end = int(generate(model)[0, PROMPTS.shape[1] + 4])
    expected = generate(model, eos_token_id=end)
    assert (expected[0, PROMPTS.shape[1] + 5 :] == 0).all()
    assert torch.equal(generate(paged(model), past_key_values=cache_of(), eos_token_id=end), expected)


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
    model = build("Gemma3n", **SHARED, **GEMMA, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4)
    expected = generate(model)
    cache = cache_of()
    assert torch.equal(generate(paged(model), past_key_values=cache), expected)
    assert len(cache) == 2


# --- memory ----------------------------------------------------------------------------------------------


def test_a_batch_holds_the_blocks_of_its_tokens_and_none_for_padding() -> None:
    model, cache = paged(build("llama")), cache_of()
    generate(model, past_key_values=cache, new=6)  # 5 of the new tokens have been computed
    assert cache.blocks_in_use == sum(-(-(length + 5) // 4) for length in (4, 10, 6)) == 3 + 4 + 3
    assert repr(cache) == "PagedCache(3 rows, 15 columns, 10 of 200 blocks of 4)"


def test_blocks_go_back_when_a_cache_is_cropped_reset_or_dropped() -> None:
    model, cache = paged(build("llama")), cache_of()
    pool = cache.pool
    generate(model, past_key_values=cache, new=6)
    cache.crop(-5)
    assert (cache.get_seq_length(), cache.blocks_in_use) == (10, 1 + 3 + 2)
    cache.crop(-100)
    assert (cache.get_seq_length(), cache.blocks_in_use) == (0, 0)
    generate(model, past_key_values=cache, new=6)
    cache.reset()
    assert (cache.get_seq_length(), pool.blocks_in_use, len(cache)) == (0, 0, 0)
    generate(model, past_key_values=cache, new=6)
    assert pool.blocks_in_use == 10
    del cache  # no cycle keeps it: no garbage collection is needed
    assert pool.blocks_in_use == 0


def test_beams_share_the_blocks_of_what_they_have_in_common() -> None:
    model, cache = paged(build("llama")), cache_of()
    generate(model, PROMPTS[1:2], MASK[1:2], num_beams=4, new=30, past_key_values=cache)
    tables = [cache.pool.manager.placement(row) for row in cache.rows]
    assert cache.blocks_in_use < sum(map(len, tables)) * 0.7
    assert len({table[0] for table in tables}) == 1


def test_a_copy_is_a_fork() -> None:
    model, cache = build("gemma3"), cache_of()
    longer = torch.cat([PROMPTS, PROMPTS[:, -4:] + 40], 1)
    longer_mask = torch.nn.functional.pad(MASK, (0, 4), value=1)
    expected = [generate(model), generate(model, longer, longer_mask)]
    generate(paged(model), past_key_values=cache, new=1)
    fork = copy.deepcopy(cache)
    assert (cache.blocks_in_use, fork.blocks_in_use, cache.pool.blocks_in_use) == (6, 6, 6)
    cache.crop(-1)
    fork.crop(-1)
    assert torch.equal(generate(model, past_key_values=cache), expected[0])
    assert torch.equal(generate(model, longer, longer_mask, past_key_values=fork), expected[1])
    assert cache.pool.blocks_in_use < cache.blocks_in_use + fork.blocks_in_use
    pool = cache.pool
    del cache, fork
    assert pool.blocks_in_use == 0


def test_a_filled_prompt_goes_on_several_times() -> None:
    model, cache = build("llama"), cache_of()
    prompt = PROMPTS[1:2]
    expected = generate(model, prompt, torch.ones_like(prompt), **WAYS["sampled"])
    with torch.no_grad():
        paged(model)(prompt[:, :-1], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    assert cache.blocks_in_use == 3
    tokens = generate(model, prompt, torch.ones_like(prompt), past_key_values=cache, **WAYS["sampled"])
    assert torch.equal(tokens, expected)


def test_two_caches_share_a_pool() -> None:
    model = build("qwen3")
    other = torch.tensor([[1, 60, 61, 62]])
    expected = [generate(model), generate(model, other, torch.ones_like(other))]
    first = cache_of(num_blocks=40)
    second = PagedCache(pool=first.pool)
    tokens = [
        generate(paged(model), past_key_values=first),
        generate(model, other, torch.ones_like(other), past_key_values=second),
    ]
    assert [torch.equal(a, b) for a, b in zip(tokens, expected, strict=True)] == [True, True]
    assert first.pool.blocks_in_use == first.blocks_in_use + second.blocks_in_use


def test_the_kernel_reads_the_cache_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache, seen = paged(build("llama", num_hidden_layers=1)), cache_of(), set()

    def spy(call: AttentionCall, backend: str) -> None:
        seen.add(call.keys.ctypes.data)
        attend(call, backend)

    monkeypatch.setattr(kernel_api, "attend", spy)
    generate(model, past_key_values=cache, new=4)
    keys, _ = cache.pool.layer(0, torch.zeros(1, 2, 1, 8))
    assert seen == {keys.data_ptr()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_cache_has_the_dtype_of_the_model(dtype: str) -> None:
    model, cache = build("qwen2"), cache_of()
    with torch.inference_mode():
        expected = model(PROMPTS, attention_mask=MASK).logits[:, -1]
        half = paged(model.to(getattr(torch, dtype)))
        for first, last in ((0, 4), (4, 9), (9, 10)):
            logits = half(PROMPTS[:, first:last], attention_mask=MASK[:, :last], past_key_values=cache).logits[:, -1]
    keys, values = cache.pool.layer(0, torch.zeros(1, 2, 1, 8, dtype=getattr(torch, dtype)))
    assert keys.dtype == values.dtype == getattr(torch, dtype)
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


# --- several runs with one cache ---------------------------------------------------------------------------


def test_a_chat_goes_on_in_its_cache() -> None:
    model, cache = build("mistral"), cache_of()
    turns = [torch.tensor([[1, 20, 21, 22, 23]]), torch.tensor([[30, 31]]), torch.tensor([[40, 41, 42, 43]])]
    chat = torch.zeros(1, 0, dtype=torch.long)
    for turn in turns:
        chat = torch.cat([chat, turn], 1)
        ones = torch.ones_like(chat)
        model.set_attn_implementation("eager")
        expected = generate(model, chat, ones, new=8)
        before = cache.get_seq_length()
        chat = generate(paged(model), chat, ones, new=8, past_key_values=cache)
        assert torch.equal(chat, expected)
        assert cache.get_seq_length() == chat.shape[1] - 1 > before


def test_a_chat_of_a_batch_whose_turns_differ_in_length() -> None:
    """Padding between the turns. Each row goes on as it does alone, which with a window eager attention does not do."""
    model, cache = build("gemma2"), cache_of()
    first = generate(paged(model), past_key_values=cache, new=3)
    turn = torch.tensor([[0, 0, 50], [51, 52, 53], [0, 54, 55]])
    chat = torch.cat([first, turn], 1)
    mask = torch.cat([MASK, torch.ones(3, 3, dtype=torch.long), (turn != 0).long()], 1)
    together = generate(model, chat, mask, past_key_values=cache, new=8)
    for row in range(3):
        alone = chat[row : row + 1, mask[row].bool()]
        model.set_attn_implementation("eager")
        expected = generate(model, alone, torch.ones_like(alone), new=8)
        assert together[row, chat.shape[1] :].tolist() == expected[0, alone.shape[1] :].tolist()


def test_a_full_pool_is_refused_with_counts_and_leaves_the_cache_whole() -> None:
    model = build("llama")
    expected = generate(model)
    other = cache_of(num_blocks=16)
    cache = PagedCache(pool=other.pool)
    with torch.no_grad():
        paged(model)(PROMPTS[1:2], past_key_values=other)
    with pytest.raises(OutOfBlocks, match=r"^no room for 3 new tokens in 3 rows: in use, of blocks of 4, are 16 of"):
        generate(model, past_key_values=cache)
    assert cache.pool.blocks_in_use == 16
    length = cache.get_seq_length()
    cache.pool.manager.check_integrity()
    cache.crop(-4)  # what has been generated is lost with the exception; the cache is not
    other.reset()
    assert 10 < length - 4 == cache.get_seq_length()
    bigger = cache_of()
    assert torch.equal(generate(model, past_key_values=bigger), expected)
    tokens = generate(model, expected[:, : length - 3], _ones_after(length - 3), past_key_values=cache, new=4)
    assert torch.equal(tokens, expected[:, : length + 1])


def _ones_after(columns: int) -> Any:
    return torch.nn.functional.pad(MASK, (0, columns - MASK.shape[1]), value=1)


def test_a_prompt_that_does_not_fit_leaves_a_new_cache_as_it_was() -> None:
    cache = cache_of(num_blocks=5)
    message = (
        "no room for 20 new tokens in 3 rows: in use, of blocks of 4, are 0 of 5 "
        "(no room for 6 blocks (seq_id 0, 1, 2): 5 available)"
    )
    with pytest.raises(OutOfBlocks) as refused:
        generate(paged(build("llama")), past_key_values=cache)
    assert str(refused.value) == message
    assert (cache.get_seq_length(), cache.pool.blocks_in_use) == (0, 0)
    one = generate(paged(build("llama")), PROMPTS[1:2], MASK[1:2], past_key_values=cache, new=4)  # another batch
    assert (one.shape, cache.blocks_in_use) == ((1, 14), 4)


def test_an_interrupted_run_counts_for_nothing() -> None:
    model, cache = build("gemma3"), cache_of()
    expected = generate(model)
    steps = 0

    def interrupt(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise KeyboardInterrupt

    with model.model.layers[1].mlp.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        generate(paged(model), past_key_values=cache)
    length = cache.get_seq_length()
    assert length == PROMPTS.shape[1] + 6
    tokens = generate(model, expected[:, : length + 1], _ones_after(length + 1), past_key_values=cache, new=13)
    assert torch.equal(tokens, expected)
    assert cache.pool.blocks_in_use == cache.blocks_in_use


def test_a_first_run_that_was_interrupted_is_to_be_reset() -> None:
    model, cache = paged(build("llama")), cache_of()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with model.model.layers[1].mlp.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        generate(model, past_key_values=cache)
    with torch.no_grad(), pytest.raises(ValueError, match=r"layer 2 has 0 columns; the cache has 11. .* cache.reset"):
        model(PROMPTS[:, :1], attention_mask=_ones_after(11), past_key_values=cache)
    cache.reset()
    expected = generate(model, use_cache=False)
    assert torch.equal(generate(model, past_key_values=cache), expected)


# --- refusals --------------------------------------------------------------------------------------------


def test_without_a_cache_the_attention_is_that_of_the_model() -> None:
    model = build("gpt_oss")
    expected = generate(model, new=6)
    assert torch.equal(generate(paged(model), use_cache=False, new=6), expected)


def refused(call: Callable[[], Any], message: str) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("other", ["eager", "sdpa"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_forgotten_set_attn_implementation_is_refused(other: str, num_layers: int) -> None:
    model, cache = build("llama", num_hidden_layers=num_layers), cache_of()
    model.set_attn_implementation(other)
    refused(lambda: generate(model, past_key_values=cache), r'call model.set_attn_implementation\("paged_ref"\) first')
    assert (cache.get_seq_length(), cache.blocks_in_use) == (0, 0)


def test_what_the_model_carries_is_no_tensor() -> None:
    new, _ = cache_of().update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    assert not hasattr(new, "to")
    refused(lambda: new.shape, "the model opens K, V or the mask")
    refused(lambda: new[0], "the model opens K, V or the mask")
    refused(lambda: torch.zeros(3) @ new, "the model opens K, V or the mask")
    refused(lambda: torch.cat([new, new]), "the model opens K, V or the mask")


def test_another_cache_is_refused() -> None:
    model = paged(build("llama"))
    refused(lambda: generate(model), "1 new tokens meet K of 11, which lies in no PagedCache")
    refused(lambda: generate(model, cache_implementation="static"), "paged_ref cannot serve this model")


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("Llama4", {"attention_chunk_size": 8, "head_dim": 8, "num_local_experts": 2}, "a mask of .*chunked_overlay"),
        ("gemma3", {"use_bidirectional_attention": True}, "a mask of .* has no paged kernel|bidirectional attention"),
        ("llama", {"is_causal": False}, "a mask of bidirectional_mask_function has no paged kernel"),
        ("Gemma4", {**SHARED, **GEMMA, "global_head_dim": 8}, "cannot serve this model"),
        ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "another state than K and V .conv"),
        ("Bloom", {"n_head": 4}, "cannot serve this model|has no paged kernel"),
    ],
)  # fmt: skip
def test_what_has_no_paged_kernel_is_refused_by_its_name(family: str, keys: dict[str, Any], message: str) -> None:
    model, cache = build(family, **keys), cache_of()
    refused(lambda: generate(paged(model), past_key_values=cache), message)


def test_masks_made_by_hand_are_refused() -> None:
    model = paged(build("llama"))
    mask = torch.ones(3, 1, 10, 10, dtype=torch.bool).tril()
    refused(lambda: model(PROMPTS, attention_mask=mask, past_key_values=cache_of()), r"a tensor of \[3, 1, 10, 10\]")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])  # three sequences in one row
    refused(lambda: model(PROMPTS[1:2], position_ids=positions, use_cache=False), "a mask of .*packed_sequence")


def test_gradients_and_dropout_are_refused() -> None:
    model, cache = paged(build("llama", attention_dropout=0.1)), cache_of()
    with pytest.raises(ValueError, match=r"no backward; run the model under torch.no_grad\(\)"):
        model(PROMPTS, attention_mask=MASK, past_key_values=cache)
    refused(lambda: generate(model.train(), past_key_values=cache), r"dropout is 0.1; .* call model.eval\(\)")
    assert cache.blocks_in_use == 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"position_bias": 0}, "attention with position_bias has no paged kernel"),
        ({"output_attentions": True}, "attention with output_attentions has no paged kernel"),
        ({"is_causal": False}, "bidirectional attention has no paged kernel"),
        ({"attention_mask": None}, "there is no mask; paged_ref needs"),
    ],
)
def test_an_attention_that_is_called_in_another_way_is_refused(how: dict[str, Any], message: str) -> None:
    states = torch.zeros(1, 2, 3, 8)
    refused(lambda: attention(None, states, states, states, **{"attention_mask": None} | how), message)


def test_a_cross_attention_is_refused() -> None:
    model = paged(build("gpt2", add_cross_attention=True))
    refused(
        lambda: model(PROMPTS, encoder_hidden_states=torch.zeros(3, 10, 32), use_cache=False),
        "a mask of bidirectional_mask_function has no paged kernel",
    )


def test_a_cache_is_refused_that_does_not_fit_the_batch() -> None:
    model, cache = paged(build("llama")), cache_of()
    generate(model, past_key_values=cache, new=6)
    one, ones = PROMPTS[:1], torch.ones(1, 16, dtype=torch.long)
    before = (cache.rows.copy(), cache.get_seq_length(), cache.blocks_in_use)
    refused(lambda: model(one[:, :1], attention_mask=ones, past_key_values=cache), "the batch has 1 rows; .* has 3")
    refused(lambda: generate(model, past_key_values=cache), "the attention mask has 10 columns; the cache has 15")
    refused(
        lambda: model(PROMPTS[:, :1], past_key_values=cache, attention_mask=torch.ones(3, 16)),
        "the attention mask hides other columns of the past",
    )
    refused(lambda: generate(model, past_key_values=cache_of(), use_cache=False), "not use_cache=False")
    refused(lambda: cache.crop(3), "tokens_to_remove is 3; a negative number is expected")
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([0, 3]))
    assert (cache.rows, cache.get_seq_length(), cache.blocks_in_use) == before
    cache.pool.manager.check_integrity()


def test_a_pool_serves_one_model() -> None:
    cache = cache_of()
    generate(paged(build("llama")), past_key_values=cache, new=2)
    message = r"K of layer 0 is torch.float32 \[2, 16\] on cpu; the pool has torch.float32 \[2, 8\] on cpu. Another"
    model = paged(build("qwen3"))
    refused(lambda: generate(model, past_key_values=PagedCache(pool=cache.pool), new=2), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"needs either num_blocks and block_size \(16\), or pool=other\.pool alone"),
        ({"block_size": 4}, "needs either num_blocks"),
        ({"num_blocks": -1}, "num_blocks is -1; at least 1"),
        ({"num_blocks": 0}, "num_blocks is 0; at least 1"),
        ({"num_blocks": 4, "block_size": 0}, "block_size is 0; at least 1"),
        ({"num_blocks": 4, "block_size": 1.5}, "block_size is 1.5; a whole number is needed"),
        ({"num_blocks": "x"}, "num_blocks is 'x'; a whole number is needed"),
        ({"num_blocks": 10**12}, "num_blocks is 1000000000000, which needs 64,000.0 GB; this machine has"),
    ],
)
def test_a_cache_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PagedCache(**arguments)
    pool = cache_of().pool
    for wrong in ({"num_blocks": 4, "pool": pool}, {"block_size": 4, "pool": pool}, {"pool": cache_of()}):
        with pytest.raises(ValueError, match=r"or pool=other\.pool alone"):
            PagedCache(**wrong)


def test_a_pool_that_does_not_fit_is_refused_before_its_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = paged(build("llama")), PagedCache(1000)
    monkeypatch.setattr(memory_limit, "machine_memory", lambda: 3 * 1000 * 16 * 2 * 8 * 4)
    message = "num_blocks is 1000, in blocks of 16 tokens, for 2 layers: a KV cache of this size needs 0.0 GB"
    refused(lambda: generate(model, past_key_values=cache, new=2), message)
    assert len(cache.pool.layers) == 1
