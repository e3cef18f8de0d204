"""What LLM takes as a prompt, and what it refuses by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paged_ref import LLM, SamplingParams
from paged_ref.extras.prompts import read_prompt, read_prompts

IDS = [5, 6, 7]


class Tensor:
    """Like a tensor of another library: a number of it has no axis, but a method for elements."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)
        self.ndim = self.values.ndim

    def __iter__(self) -> Any:
        if not self.ndim:
            raise TypeError("iteration over a 0-d tensor")
        return map(Tensor, self.values)

    def __index__(self) -> int:
        return int(self.values.__index__())


@pytest.mark.parametrize(
    "prompt",
    [
        IDS, tuple(IDS), np.array(IDS), np.array(IDS, np.uint8), Tensor(IDS), iter(IDS), range(5, 8),
        {"prompt_token_ids": IDS}, {"prompt_token_ids": np.array(IDS)}, {"prompt_token_ids": IDS, "prompt": "text"},
        [IDS], (IDS,), np.array([IDS]), Tensor([IDS]), iter([IDS]), [np.array(IDS)], [Tensor(IDS)],
        [{"prompt_token_ids": IDS}],
    ],
    ids=lambda prompt: type(prompt).__name__,
)  # fmt: skip
def test_token_ids_of_any_kind(prompt: Any) -> None:
    (output,) = LLM("tiny").generate(prompt, SamplingParams(max_tokens=2))
    assert output.prompt_token_ids == IDS
    assert all(type(i) is int for i in output.prompt_token_ids)


@pytest.mark.parametrize("prompt", ["Once", ["Once"], {"prompt": "Once"}, [{"prompt": "Once"}], iter(["Once"])])
def test_text_of_any_kind(prompt: Any) -> None:
    (output,) = LLM("tiny").generate(prompt, SamplingParams(max_tokens=2))
    assert output.prompt == "Once"


def test_several() -> None:
    assert read_prompts([IDS, "Once", {"prompt": "x"}]) == [IDS, "Once", {"prompt": "x"}]
    assert read_prompts([]) == []
    assert [list(row) for row in read_prompts(np.array([IDS, IDS]))] == [IDS, IDS]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"Once", "the prompt is b'Once'; text or token ids are needed"),
        (5, "the prompt is 5; text or token ids are needed"),
        (None, "the prompt is None; text or token ids are needed"),
        (1.5, r"the prompt is 1\.5; text or token ids are needed"),
        ([True, False], "a token id of the prompt is True; a whole number is needed"),
        ([5, 6.0], r"a token id of the prompt is 6\.0; a whole number is needed"),
        ([5, "a"], "a token id of the prompt is 'a'; a whole number is needed"),
        (np.array([1.5]), r"a token id of the prompt is .*1\.5.*; a whole number is needed"),
        ({"prompt_embeds": 3}, r"the prompt has the keys \['prompt_embeds'\]; known are prompt, prompt_token_ids"),
        ({}, r"the prompt has the keys \[\]; known are"),
        ({"prompt": None}, "the prompt is None; text or token ids are needed"),
        ("\udcff\udcfe", r"the prompt holds '\\udcff' at place 0, which is no character"),
    ],
)
def test_what_is_no_prompt(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompt(prompt)
    llm = LLM("tiny")
    with pytest.raises(ValueError, match=message):
        llm.add_request(prompt)
    with pytest.raises(ValueError, match="prompt"):
        llm.generate(prompt)
    assert not llm.has_unfinished


@pytest.mark.parametrize("params", [{"max_tokens": 3}, "greedy", 3])
def test_params_of_another_kind(params: Any) -> None:
    with pytest.raises(ValueError, match=r"params is .*; SamplingParams are needed"):
        LLM("tiny").add_request("Once", params)
    with pytest.raises(ValueError, match="params"):
        LLM("tiny").generate("Once", params)


def test_words_of_vllm_for_what_has_another_name_here() -> None:
    llm = LLM("tiny")
    for call, name, instead in (
        ("generate", "sampling_params", "give params"), ("generate", "use_tqdm", "give on_token"),
        ("stream", "sampling_params", "give params"), ("chat", "sampling_params", "give params"),
        ("generate", "foo", "known are prompts, params, on_token"),
        ("chat", "foo", "known are messages, params, chat_template, add_generation_prompt, continue_final_message, "
         "tools, chat_template_kwargs, on_token"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{call} has no argument {name}; {instead}$"):
            getattr(llm, call)(["a"], **{name: None})


def test_a_sentence_shows_what_is_given_in_one_line_and_not_all_of_it() -> None:
    with pytest.raises(ValueError, match=r"^max_tokens is array\(\[\[0, 0\], \[0, 0\]\]\); a whole number is needed$"):
        SamplingParams(max_tokens=np.zeros((2, 2), int))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^n is \[1, 1, 1, 1, 1, 1, \.\.\.\]; a whole number is needed$"):
        SamplingParams(n=[1] * 10**5)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bfloat16", "bloat", None, 5])
def test_another_dtype(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype is .*; known are float16, float32"):
        LLM("tiny", dtype=dtype)


@pytest.mark.parametrize(
    ("options", "more", "length"),
    [
        ({"kv_cache_tokens": 4096}, {}, 512),  # the context of the embedded model
        ({"kv_cache_tokens": 4096, "max_model_len": 40}, {}, 40),
        ({"block_size": 4, "kv_cache_tokens": 64}, {}, 64),
        ({"block_size": 4, "kv_cache_tokens": 64}, {"n": 3, "temperature": 1.0, "seed": 0}, 25),  # 2 + 3 * 4 blocks
        ({"block_size": 4, "kv_cache_tokens": 64}, {"beam_width": 3}, 25),
        ({"manager": "standard", "kv_cache_tokens": 64}, {"n": 2, "temperature": 1.0, "seed": 0}, 64),
    ],
    ids=str,
)
def test_max_tokens_none_goes_on_to_the_end_of_the_room(options: Any, more: Any, length: int) -> None:
    """As in vLLM: to the end of the context; here also no further than the KV cache can hold all samples."""
    llm = LLM("tiny", **options)
    (output,) = llm.generate([[5] * 9], SamplingParams(max_tokens=None, ignore_eos=True, **more))
    assert {9 + len(sample.token_ids) for sample in output.outputs} == {length}
    assert {sample.finish_reason for sample in output.outputs} == {"length"}
