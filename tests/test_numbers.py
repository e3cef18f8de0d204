"""What is not a number is an error of the request that it belongs to: its sequence and step are named, others go on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paged_ref import LLM, SamplingParams
from paged_ref.core.device import on_gpu
from paged_ref.extras.sanitizer import SanitizerError

OTHER = [5, 6, 7]
ODD = 300  # a token of the failing prompt alone
KINDS = [
    {}, {"temperature": 1.0, "seed": 1}, {"n": 2, "temperature": 0.5, "seed": 1}, {"beam_width": 2},
]  # fmt: skip


def with_nan_embedding(**options: Any) -> LLM:
    """An LLM whose embedding of the token ODD is NaN."""
    llm = LLM("tiny", backend="auto" if on_gpu else "reference", **options)
    model = llm.engine.model
    model.head = model.head.copy()
    model.embedding[ODD] = np.nan
    return llm


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nan_in_the_weights_ends_the_requests_that_meet_it(kind: dict[str, Any]) -> None:
    llm = with_nan_embedding()
    params = SamplingParams(max_tokens=6, **kind)
    wanted = LLM("tiny", backend=llm.engine.kv.backend).generate(OTHER, params)[0]  # type: ignore[attr-defined]
    good = llm.output_of(llm.add_request(OTHER, params))
    llm.step()
    llm.step()
    seq_id = llm.engine.next_seq_id
    bad = llm.output_of(llm.add_request([9, ODD, 8], params))
    while llm.has_unfinished:
        llm.step()
    assert isinstance(bad.error, ValueError)
    assert str(bad.error) == (
        f"step 2: sequence {seq_id} cannot go on: its largest logit is nan after the model; weights hold NaN, or "
        "numbers grew too large"
    )
    assert {sample.finish_reason for sample in bad.outputs} <= {"error"}
    assert [sample.token_ids for sample in good.outputs] == [sample.token_ids for sample in wanted.outputs]
    with pytest.raises(ValueError, match=r"step \d+: sequence \d+ cannot go on: its largest logit is nan"):
        llm.generate([9, ODD, 8], params)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_numbers_too_large_for_float16(kind: dict[str, Any]) -> None:
    llm = LLM("tiny", dtype="float16", backend="reference")
    llm.engine.model.final_norm[:] = 6e4
    cannot = "sequence 0 cannot go on: its largest logit is"
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(ValueError, match=cannot):
        llm.generate(OTHER, SamplingParams(**kind))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("wrong", "shown"), [(-np.inf, "-inf"), (np.inf, "inf"), (np.nan, "nan")])
def test_a_hook_that_leaves_no_likeliest_token(kind: dict[str, Any], wrong: float, shown: str) -> None:
    def hook(tokens: Any, logits: np.ndarray) -> np.ndarray:
        return logits if len(tokens) < 5 else np.full_like(logits, wrong)

    llm = LLM("tiny")
    good = llm.output_of(llm.add_request(OTHER, SamplingParams(max_tokens=6)))
    bad = llm.output_of(llm.add_request(OTHER, SamplingParams(max_tokens=6, logits_hook=hook, ignore_eos=True, **kind)))
    while llm.has_unfinished:
        llm.step()
    assert isinstance(bad.error, ValueError)
    assert str(bad.error).startswith("step 2: sequence ")
    assert str(bad.error).endswith(f"cannot go on: its largest logit is {shown} after logits_hook")
    assert {sample.finish_reason for sample in bad.outputs} <= {"error"}
    assert [len(sample.token_ids) for sample in bad.outputs] == (
        [2] * (kind.get("n", 1)) if "beam_width" not in kind else []
    )
    assert (
        good.outputs[0].token_ids == LLM("tiny").generate(OTHER, SamplingParams(max_tokens=6))[0].outputs[0].token_ids
    )


def test_beams_with_fewer_candidates_than_the_width() -> None:
    allowed = [40, 41, 42]

    def hook(tokens: Any, logits: np.ndarray) -> np.ndarray:
        kept = np.full_like(logits, -np.inf)
        kept[allowed] = logits[allowed]
        return kept

    params = SamplingParams(max_tokens=3, beam_width=5, logits_hook=hook, ignore_eos=True)
    (output,) = LLM("tiny").generate(OTHER, params)
    assert len(output.outputs) == 5
    for beam in output.outputs:
        assert set(beam.token_ids) <= set(allowed)
    (one,) = LLM("tiny").generate(OTHER, SamplingParams(max_tokens=1, beam_width=5, logits_hook=hook, ignore_eos=True))
    assert sorted(beam.token_ids[0] for beam in one.outputs) == allowed


def test_the_temperature_5e_324_is_greedy() -> None:
    llm = LLM("tiny")
    (greedy,) = llm.generate(OTHER, SamplingParams())
    (drawn,) = llm.generate(OTHER, SamplingParams(temperature=5e-324, seed=0))
    assert drawn.outputs[0].token_ids == greedy.outputs[0].token_ids


@pytest.mark.parametrize("options", [{}, {"device_blocks": 4, "block_size": 4, "max_model_len": 64}], ids=str)
@pytest.mark.parametrize(
    ("part", "what"), [("embedding", "queries"), ("queries", "queries"), ("keys", "keys"), ("values", "values")]
)
def test_the_sanitizer_says_that_the_weights_hold_nan(part: str, what: str, options: dict[str, Any]) -> None:
    llm = LLM("tiny", sanitize=True, **options)
    model, config = llm.engine.model, llm.config
    if part == "embedding":
        model.embedding[OTHER[1]] = np.nan
    else:
        first = {"queries": 0, "keys": config.num_heads, "values": config.num_heads + config.num_kv_heads}[part]
        model.layers[1].qkv[first * config.head_size] = np.nan
    with pytest.raises(
        SanitizerError, match=f"has NaN or inf among its {what} in layer ., before attention: the weights"
    ):
        llm.generate(OTHER)
