"""Several ranks with one block table: the same tokens, the same blocks, and what is said is counted."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_ref import LLM, SamplingParams
from paged_ref.core.attention.attention import Addresses
from paged_ref.core.engine.engine import Observer
from paged_ref.core.engine.scheduler import StepPlan
from paged_ref.core.memory.kv import KVCache
from paged_ref.core.memory.manager import Transfer
from paged_ref.core.model.config import ModelConfig
from paged_ref.core.model.llama import StepInputs
from paged_ref.distributed.group import Group, GroupError
from paged_ref.distributed.plan import pack, plan_bytes, unpack
from paged_ref.distributed.split import Part, heads_of_ranks
from paged_ref.interop.architectures import Decoder, random_weights, weight_shapes
from paged_ref.interop.checkpoints import load
from paged_ref.interop.hf_config import ARCHITECTURES, HFConfig
from paged_ref.lesson.rank_threads import threads
from paged_ref.planner.hardware import GPUS, several
from paged_ref.planner.models import MODELS
from paged_ref.planner.roofline import Roofline
from paged_ref.timeline.events import Event, RanksOpened

PROMPTS = ["Once upon a time", "Once upon a time there was a dog", "The little girl"]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def runs(llm: LLM, params: SamplingParams, prompts: list[str] = PROMPTS) -> list[Any]:
    return [[(s.token_ids, s.text) for s in output.outputs] for output in llm.generate(prompts, params)]


# --- equal to one process ----------------------------------------------------------------------------------

SMALL = {"block_size": 4, "kv_cache_tokens": 48}
SETTINGS: dict[str, tuple[dict[str, Any], SamplingParams]] = {
    "paged": ({}, GREEDY),
    "standard": ({"manager": "standard", "kv_cache_tokens": 96, "max_model_len": 32}, GREEDY),
    "swapping": ({"manager": "swapping", "kv_cache_tokens": 40, "max_model_len": 32}, GREEDY),
    "swap": ({**SMALL, "preemption": "swap"}, GREEDY),
    "recompute": (SMALL, GREEDY),
    "prefix cache": ({"prefix_cache": True, "block_size": 4}, GREEDY),
    "fork": ({"block_size": 4}, SamplingParams(max_tokens=12, n=3, temperature=0.9, seed=3, ignore_eos=True)),
    "beams": ({"block_size": 4}, SamplingParams(max_tokens=12, beam_width=3)),
    "chunks": ({"max_batch_tokens": 5}, GREEDY),
    "chunks without logits": ({"max_batch_tokens": 2}, GREEDY),
    "int8": ({"kv_dtype": "int8"}, GREEDY),
    "scales": ({"kv_dtype": "int8", "kv_scales": [((0.4, 0.004), (0.2, 0.002))] * 5}, GREEDY),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_give_the_tokens_of_one_process(name: str, size: int) -> None:
    options, params = SETTINGS[name]
    options = {"backend": "reference", **options}
    alone = LLM("tiny", **options)
    expected = runs(alone, params)
    with threads(size, lambda group: LLM("tiny", sanitize="kv_dtype" not in options, group=group, **options)) as llms:
        assert runs(llms[0], params) == expected
        if name in ("swap", "swapping"):
            assert llms[0].engine.num_steps == alone.engine.num_steps


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - {"scales"}))  # the scales are those of the tiny model's heads
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_give_the_tokens_of_one_process_on_stories(stories260k: Path, name: str, size: int) -> None:
    options, params = SETTINGS[name]
    expected = runs(LLM(stories260k, **options), params)
    with threads(size, lambda group: LLM(stories260k, group=group, **options)) as llms:
        assert runs(llms[0], params) == expected


def test_logits_differ_by_rounding_only() -> None:
    seen: list[np.ndarray] = []

    def hook(tokens: Any, logits: np.ndarray) -> np.ndarray:
        seen.append(logits)
        return logits

    params = SamplingParams(max_tokens=6, logits_hook=hook)
    LLM("tiny", backend="reference").generate(PROMPTS, params)
    expected, seen = seen, []
    with threads(4, lambda group: LLM("tiny", backend="reference", group=group)) as llms:
        llms[0].generate(PROMPTS, params)
    assert len(seen) == len(expected) > 0
    assert max(float(abs(a - b).max()) for a, b in zip(seen, expected, strict=True)) < 1e-4


def test_every_rank_holds_its_heads_of_the_same_blocks() -> None:
    """After forks, copies on write and swaps: the ranks' K and V, side by side, are those of one process."""
    options: dict[str, Any] = {**SMALL, "backend": "reference", "preemption": "swap"}
    params = SamplingParams(max_tokens=10, n=2, temperature=0.9, seed=1, ignore_eos=True)
    alone = LLM("tiny", **options)
    runs(alone, params)
    with threads(2, lambda group: LLM("tiny", group=group, **options)) as llms:
        runs(llms[0], params)
        held = [llm.engine.kv for llm in llms]
    whole = alone.engine.kv
    assert isinstance(whole, KVCache)
    for name in ("device", "host"):
        parts = np.concatenate([getattr(kv, name) for kv in held], axis=-2)  # along the KV heads
        expected = getattr(whole, name)
        assert np.isfinite(expected).any()
        assert np.array_equal(np.isnan(parts), np.isnan(expected))
        assert np.nanmax(abs(parts - expected)) < 1e-4


@pytest.mark.slow
def test_ranks_on_the_stand_in_for_a_gpu() -> None:
    tests = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent / 'src'}{os.pathsep}{tests}"}
    words = [sys.executable, "-m", "strict_gpu", "-m", "support.gpu_ranks"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.stdout == "the same tokens\n", done.stderr


# --- what is split ---------------------------------------------------------------------------------------

QWEN = HFConfig(
    vocab_size=50, hidden_size=24, intermediate_size=37, num_layers=2, num_heads=6, num_kv_heads=3, head_size=4,
    max_position_embeddings=64, qkv_bias=True, qk_norm="head",
)  # fmt: skip


@pytest.mark.parametrize("size", [1, 3])
def test_the_parts_of_all_ranks_are_the_whole_and_each_once(size: int) -> None:
    weights = random_weights(QWEN)
    parts = [Part(QWEN, weights, rank, size) for rank in range(size)]
    for name, shape in weight_shapes(QWEN).items():
        shapes = [part[name].shape for part in parts]
        if shapes[0] == shape and size > 1:  # norms and the embedding are on every rank
            assert "norm" in name or "embed_tokens" in name
        else:
            axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
            assert np.array_equal(np.concatenate([part[name] for part in parts], axis), weights[name])
    for part in parts:
        assert isinstance(part.config, HFConfig)
        Decoder(part.config, part)  # the config fits the weights


@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name != "olmo2"])
def test_every_architecture_gives_its_tokens_on_ranks(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = (
        {**ARCHITECTURES[model_type], "attention_softcap": 20.0}
        if model_type == "gemma2"
        else ARCHITECTURES[model_type]
    )
    config = HFConfig(
        vocab_size=2048, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8,
        max_position_embeddings=128, sliding_windows=(None, 5), model_type=model_type, **pieces,
    )  # fmt: skip
    tiny = load("tiny")
    model = replace(tiny, config=config, weights=random_weights(config))
    monkeypatch.setattr("paged_ref.llm.load", lambda path: model)
    expected = runs(LLM("tiny", backend="reference"), GREEDY)
    with threads(2, lambda group: LLM("tiny", backend="reference", group=group)) as llms:
        assert runs(llms[0], GREEDY) == expected


def test_norms_over_all_heads_are_refused() -> None:
    config = HFConfig(50, 24, 40, 2, 4, 2, 8, 64, qk_norm="whole")
    with pytest.raises(ValueError, match="2 ranks cannot share a model that has a norm over all heads together"):
        Part(config, {}, 0, 2)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "said"),
    [
        (4, 2, 3, "3 ranks cannot share 4 heads and 2 KV heads; 1, 2, 4 can"),
        (12, 4, 3, "3 ranks cannot share 12 heads and 4 KV heads; 1, 2, 4, 12 can"),
        (6, 6, 12, "12 ranks cannot share 6 heads and 6 KV heads; 1, 2, 3, 6 can"),
    ],
)
def test_a_number_of_ranks_that_does_not_divide_the_heads(heads: int, kv_heads: int, size: int, said: str) -> None:
    config = ModelConfig(10, 24, 30, 1, heads, kv_heads, 4, 64)
    with pytest.raises(ValueError, match=f"^{said}$"):
        Part(config, {}, 0, size)


def test_fewer_kv_heads_than_ranks_are_kept_more_than_once() -> None:
    config = ModelConfig(10, 24, 30, 1, 8, 2, 4, 64)
    heads, kv_heads = heads_of_ranks(config, 4)
    assert heads == ((0, 2), (2, 4), (4, 6), (6, 8))
    assert kv_heads == ((0, 1), (0, 1), (1, 2), (1, 2))  # query head 4 reads KV head 1, as 4 // (8 // 2) says


def test_what_does_not_go_with_ranks() -> None:
    with pytest.raises(ValueError, match="group is a group of 1 ranks, and device_blocks is 4; the two do not go"):
        threads(1, lambda group: LLM("tiny", device_blocks=4, group=group)).__enter__()


# --- what is said ----------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_its_buffer() -> None:
    transfers = [
        Transfer("copy", 3, 4),
        Transfer("swap_out", 1, 0, 5),
        Transfer("swap_in", 0, 7),
        Transfer("move", 9, 2, 3),
    ]
    for tables, starts in ((np.array([[3, -1], [1, 2]]), None), (None, np.array([8, 0]))):
        where = Addresses(np.array([3, 6]), np.array([0, 1, 3]), tables, starts, np.array([5, 6, 7]))
        given = StepInputs(np.array([9, 8, 7]), np.array([2, 4, 5]), np.array([0]), where)
        buffer = pack(transfers, given)
        moved, inputs = unpack(buffer)
        assert moved == transfers
        for name in ("token_ids", "positions", "logits_rows"):
            assert np.array_equal(getattr(inputs, name), getattr(given, name))
        for name in ("seq_lens", "query_start_loc", "block_tables", "starts", "slot_mapping"):
            assert np.array_equal(getattr(inputs.addresses, name), getattr(where, name)), name
        assert buffer.dtype == np.int32
        assert buffer.nbytes == plan_bytes(3, 2, 1, 0 if tables is None else 2, 4)


class Formula(Observer):
    """What the docstring of distributed/group.py says of each step."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.tokens, self.rows = config, 0, 0
        self.bytes = dict.fromkeys(("broadcast", "reduced", "gathered"), 0)

    def before_step(self, plan: StepPlan, inputs: StepInputs) -> None:
        tokens, rows, where = len(inputs.token_ids), len(inputs.logits_rows), inputs.addresses
        columns = 0 if where.block_tables is None else where.block_tables.shape[1]
        self.bytes["broadcast"] += plan_bytes(tokens, len(where.seq_lens), rows, columns, len(plan.transfers))
        self.bytes["reduced"] += 2 * self.config.num_layers * tokens * self.config.hidden_size * 4
        self.bytes["gathered"] += rows * self.config.vocab_size * 4
        self.tokens += tokens


@pytest.mark.parametrize("name", ["paged", "standard", "swap", "beams"])
def test_the_bytes_that_are_said_are_those_of_the_formula(name: str) -> None:
    options, params = SETTINGS[name]
    groups: list[Group] = []

    def make(group: Group) -> LLM:
        groups.append(group)
        return LLM("tiny", backend="reference", group=group, **options)

    with threads(2, make) as llms:
        formula = Formula(llms[0].config)
        llms[0].engine.observers.append(formula)
        runs(llms[0], params)
        assert groups[0].bytes == formula.bytes
        assert groups[1].bytes["reduced"] == formula.bytes["reduced"]


def test_the_planner_counts_the_bytes_that_ranks_send() -> None:
    """In a ring each rank sends 2 (n - 1) / n of what is reduced; the planner takes 16-bit numbers, and no overhead.
    What the planner leaves out is small: the plan, and the logits that are gathered."""
    size = 2
    groups: list[Group] = []

    def make(group: Group) -> LLM:
        groups.append(group)
        return LLM("tiny", backend="reference", group=group)

    with threads(size, make) as llms:
        config, formula = llms[0].config, Formula(llms[0].config)
        llms[0].engine.observers.append(formula)
        runs(llms[0], GREEDY)
    gpu, spec = several(GPUS["A100-80GB"], size), MODELS["OPT-13B"]
    roofline = Roofline(gpu, spec)
    sent = roofline.reduce_token_seconds * gpu.peer * roofline.constants.peer_share  # bytes for each token
    values = sent / (2 * (size - 1) / size) / 2  # 16-bit numbers that are reduced
    assert values == pytest.approx(2 * spec.num_layers * spec.hidden_size)
    ours = groups[0].bytes["reduced"] / 4 / formula.tokens  # the same count for the model that ran
    assert ours == 2 * config.num_layers * config.hidden_size
    # of a decode step of the large model, a row of logits for each token, and a table of 64 blocks for each sequence
    left_out = spec.vocab_size * 2 / size + plan_bytes(1, 1, 1, 64, 0)
    assert left_out / sent < 0.07


@pytest.mark.parametrize("size", [1, 4, 8, 16, 32])
def test_the_planner_counts_the_kv_heads_that_ranks_keep_twice(size: int) -> None:
    model = MODELS["Llama-3-8B"]
    config = ModelConfig(10, 4096, 30, 1, 32, model.num_kv_heads, 128, 64)
    _, kv_heads = heads_of_ranks(config, size)
    held = sum(end - first for first, end in kv_heads)
    assert Roofline(several(GPUS["A100-80GB"], size), model).kv_copies == held / model.num_kv_heads


# --- what goes wrong --------------------------------------------------------------------------------------


def test_a_step_that_was_interrupted_leaves_the_ranks_out_of_step() -> None:
    with threads(2, lambda group: LLM("tiny", backend="reference", group=group)) as llms:
        llm = llms[0]
        real = llm.engine.model.forward

        def interrupted(*parts: Any) -> Any:
            llm.engine.model.forward = real  # type: ignore[method-assign]
            raise KeyboardInterrupt

        llm.engine.model.forward = interrupted  # type: ignore[assignment,method-assign]
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY)
        with pytest.raises(GroupError, match="a step was interrupted, and the ranks are out of step; make a new group"):
            llm.generate(PROMPTS, GREEDY)


def test_a_hook_that_raises_is_no_interrupted_step() -> None:
    def hook(tokens: Any, logits: np.ndarray) -> np.ndarray:
        raise ArithmeticError

    with threads(2, lambda group: LLM("tiny", backend="reference", group=group)) as llms:
        expected = runs(llms[0], GREEDY)
        with pytest.raises(ArithmeticError):
            llms[0].generate(PROMPTS, SamplingParams(logits_hook=hook))
        assert runs(llms[0], GREEDY) == expected


def test_a_rank_that_fails_ends_the_step() -> None:
    with threads(2, lambda group: LLM("tiny", backend="reference", group=group)) as llms:

        def fails(*parts: Any) -> Any:
            raise ZeroDivisionError("of rank 1")

        llms[1].engine.model.forward = fails  # type: ignore[assignment,method-assign]
        with pytest.raises(GroupError, match=r"rank 1 has failed: ZeroDivisionError\('of rank 1'\)"):
            llms[0].generate(PROMPTS, GREEDY)


# --- the log ---------------------------------------------------------------------------------------------


def test_the_log_says_which_rank_holds_which_heads() -> None:
    events: list[Event] = []
    make = lambda group: LLM("tiny", group=group, log=None if group.rank else events.append)  # noqa: E731
    with threads(4, make):
        pass
    (opened,) = (event for event in events if isinstance(event, RanksOpened))
    assert [opened.heads, opened.kv_heads] == heads_of_ranks(LLM("tiny").config, 4)
    assert opened.heads == ((0, 1), (1, 2), (2, 3), (3, 4))
