"""The parameters of a request: bounds, what beam search excludes, and values of the wrong type."""

from __future__ import annotations

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
        ({"seed": -1}, "seed is -1; at least 0"),
        ({"stop": ["a", ""]}, "stop holds an empty string"),
        ({"stop": ""}, "stop holds an empty string"),
        ({"beam_width": 0}, "beam_width is 0; at least 1"),
        ({"beam_width": 2, "temperature": 1.0}, "temperature is 1.0; beam search takes no temperature"),
        ({"beam_width": 2, "n": 2}, "n is 2; beam search takes no n"),
        ({"beam_width": 2, "top_k": 3}, "top_k is 3; beam search takes no top_k"),
        ({"beam_width": 2, "top_p": 0.5}, "top_p is 0.5; beam search takes no top_p"),
        ({"beam_width": 2, "stop": "x"}, "beam search takes no stop"),
        ({"length_penalty": float("nan")}, "length_penalty is nan; a finite number"),
        # of the wrong type
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


def test_none_is_the_default() -> None:
    names = ("temperature", "n", "stop", "stop_token_ids", "ignore_eos", "length_penalty", "seed")
    nothing: dict[str, Any] = dict.fromkeys(names)
    assert SamplingParams(**nothing) == SamplingParams()


@pytest.mark.parametrize("top_k", [0, -1, None])
def test_top_k_without_a_bound(top_k: int | None) -> None:
    assert SamplingParams(top_k=top_k).top_k is None


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
