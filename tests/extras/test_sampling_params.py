"""The parameters of a request: bounds, what beam search excludes, and values of the wrong type."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from paged_ref.extras.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; at least 1"),
        ({"max_tokens": -3}, "max_tokens is -3; at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1; at least 0"),
        ({"temperature": float("nan")}, "temperature is nan; a finite number"),
        ({"temperature": float("inf")}, "temperature is inf; a finite number"),
        ({"top_k": -2}, "top_k is -2; at least -1"),
        ({"top_p": 0.0}, "top_p is 0.0; above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"n": 0}, "n is 0; at least 1"),
        ({"seed": -2}, "seed is -2; at least -1"),
        ({"stop": ["a", ""]}, "stop holds an empty string"),
        ({"stop": ""}, "stop holds an empty string"),
        ({"beam_width": 0}, "beam_width is 0; at least 1"),
        ({"beam_width": 2, "temperature": 1.0}, "temperature is 1.0; beam search takes no temperature"),
        ({"beam_width": 2, "n": 2}, "n is 2; beam search takes no n"),
        ({"beam_width": 2, "top_k": 3}, "top_k is 3; beam search takes no top_k"),
        ({"beam_width": 2, "top_p": 0.5}, "top_p is 0.5; beam search takes no top_p"),
        ({"beam_width": 2, "stop": "x"}, "beam search takes no stop"),
        ({"length_penalty": float("nan")}, "length_penalty is nan; a finite number"),
        ({"length_penalty": 1e30}, r"length_penalty is 1e\+30; -10 to 10 is needed"),
        ({"length_penalty": -1e30}, r"length_penalty is -1e\+30; -10 to 10 is needed"),
        ({"stop": np.array(3)}, r"stop is array\(3\); a text, or several, are needed"),
        ({"stop_token_ids": np.array(3)}, r"stop_token_ids is array\(3\); token ids are needed"),
        ({"best_of": 3}, "SamplingParams has no argument best_of; give n, or beam_width for the best of a search$"),
        (
            {"n": 2, "foo": 3},
            "SamplingParams has no argument foo; known are max_tokens, temperature, top_k, .*bad_words",
        ),
        ({"min_p": 1.5}, r"min_p is 1\.5; 0 to 1 is needed"),
        ({"min_p": -0.1}, r"min_p is -0\.1; 0 to 1 is needed"),
        ({"presence_penalty": 2.5}, r"presence_penalty is 2\.5; -2 to 2 is needed"),
        ({"frequency_penalty": -3}, r"frequency_penalty is -3\.0; -2 to 2 is needed"),
        ({"repetition_penalty": 0}, r"repetition_penalty is 0\.0; a number above 0 is needed"),
        ({"min_tokens": -1}, "min_tokens is -1; at least 0"),
        ({"min_tokens": 17}, "min_tokens is 17; at most max_tokens = 16 is allowed"),
        ({"logprobs": -2}, "logprobs is -2; at least -1"),
        ({"prompt_logprobs": -2}, "prompt_logprobs is -2; at least -1"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty; at least one token id is needed"),
        ({"bad_words": ["a", ""]}, "bad_words holds an empty string; it forbids nothing"),
        ({"beam_width": 2, "logprobs": 0}, "logprobs is 0; beam search takes no logprobs"),
        ({"beam_width": 2, "min_p": 0.1}, r"min_p is 0\.1; beam search takes no min_p"),
        ({"beam_width": 2, "bad_words": "x"}, "beam search takes no bad_words"),
        # of the wrong type
        ({"logit_bias": [1]}, r"logit_bias is \[1\]; a dict from token id to bias is needed"),
        ({"logit_bias": {"x": 1}}, "a token id in logit_bias is 'x'; a whole number is needed"),
        ({"logit_bias": {3: "x"}}, "logit_bias of 3 is 'x'; a finite number is needed"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias of 3 is inf; a finite number is needed"),
        ({"bad_words": [3]}, "bad_words holds 3; texts are needed"),
        ({"allowed_token_ids": 3}, "allowed_token_ids is 3; token ids are needed"),
        ({"logprobs": 1.0}, r"logprobs is 1\.0; a whole number"),
        ({"min_tokens": True}, "min_tokens is True; a whole number"),
        ({"skip_special_tokens": 1}, "skip_special_tokens is 1; True or False is needed"),
        ({"include_stop_str_in_output": None, "min_p": "x"}, "min_p is 'x'; a finite number"),
        ({"max_tokens": 2.0}, r"max_tokens is 2\.0; a whole number"),
        ({"max_tokens": "12"}, "max_tokens is '12'; a whole number"),
        ({"max_tokens": True}, "max_tokens is True; a whole number"),
        ({"n": 1.0}, r"n is 1\.0; a whole number"),
        ({"seed": 1.5}, r"seed is 1\.5; a whole number"),
        ({"top_k": 2.5}, r"top_k is 2\.5; a whole number"),
        ({"temperature": "0.8"}, "temperature is '0.8'; a finite number"),
        ({"temperature": True}, "temperature is True; a finite number"),
        ({"top_p": [0.9]}, r"top_p is \[0\.9\]; a finite number"),
        ({"stop": b"end"}, "stop is b'end'; a text, or several, are needed"),
        ({"stop": [b"end"]}, "stop holds b'end'; texts are needed"),
        ({"stop": ["a", "\udcff"]}, r"stop holds '\\udcff' at place 0, which is no character"),
        ({"stop": 3}, "stop is 3; a text"),
        ({"stop_token_ids": 2}, "stop_token_ids is 2; token ids are needed"),
        ({"stop_token_ids": "23"}, "stop_token_ids is '23'; token ids are needed"),
        ({"stop_token_ids": b"23"}, "stop_token_ids is b'23'; token ids are needed"),
        ({"stop_token_ids": [1.5]}, r"a token id in stop_token_ids is 1\.5; a whole number"),
        ({"stop_token_ids": [True]}, "a token id in stop_token_ids is True; a whole number"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'; True or False is needed"),
        ({"logits_hook": 5}, "logits_hook is 5; a function is needed"),
    ],
)
def test_params_out_of_bounds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_params_are_shown_copied_and_pickled() -> None:
    params = SamplingParams(temperature=1.0, n=2, stop="a")
    assert [*inspect.signature(SamplingParams).parameters] == [field.name for field in fields(SamplingParams)]
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == replace(params) == params


def test_none_is_the_default() -> None:
    names = ("temperature", "n", "stop", "stop_token_ids", "ignore_eos", "length_penalty", "seed")
    nothing: dict[str, Any] = dict.fromkeys(names)
    assert SamplingParams(**nothing) == SamplingParams()


@pytest.mark.parametrize("top_k", [0, -1, None])
def test_top_k_without_a_bound(top_k: int | None) -> None:
    assert SamplingParams(top_k=top_k).top_k is None


def test_the_off_values_of_vllm() -> None:
    off: dict[str, Any] = {
        "seed": -1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "logit_bias": {}, "bad_words": [], "stop": [],
        "logprobs": False, "top_p": None, "min_tokens": 0, "presence_penalty": 0, "allowed_token_ids": None,
    }  # fmt: skip
    assert SamplingParams(**off) == SamplingParams()
    assert SamplingParams(logprobs=True).logprobs == 1
    assert SamplingParams(logit_bias={"12": 3}).logit_bias == {12: 3.0}  # type: ignore[dict-item]  # as JSON has it


def test_equal_samples_are_announced() -> None:
    with pytest.warns(UserWarning, match="n is 3, and at temperature 0 all samples are the same"):
        SamplingParams(n=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SamplingParams(n=3, temperature=0.1)
        SamplingParams(n=3, logits_hook=lambda tokens, logits: logits)


def test_what_is_read_once_is_kept() -> None:
    params = SamplingParams(stop=iter(["a", "b"]), stop_token_ids=iter([1, 2]))  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (1, 2))
    assert SamplingParams(stop="end").stop == ("end",)


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(
        max_tokens=np.int64(3), temperature=np.float32(0.5), stop_token_ids=np.array([4, 5])  # type: ignore[arg-type]
    )  # fmt: skip
    assert (params.max_tokens, params.temperature, params.stop_token_ids) == (3, 0.5, (4, 5))
    assert type(params.max_tokens) is int
