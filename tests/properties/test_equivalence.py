"""The equivalence contract: however memory is managed, and however the work is cut into steps, no token changes.

CONTRACT is the contract. tests/README.md shows it as a table, and each test here runs one entry of it;
`python tests/properties/test_equivalence.py` prints the table.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.driving import Engine, Logits, Run, furthest, narrowest

from paged_ref import SamplingParams
from paged_ref.core.device import on_gpu
from paged_ref.kernels import backends
from paged_ref.timeline.events import SequenceAdmitted

# Those that read host memory run no model whose arrays are on a GPU.
BACKENDS = ["reference"] if on_gpu else [name for name in ("reference", "cpu", "cpu-simd") if name in backends()]
README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- the contract: from test_equivalence.py -->\n", "<!-- end of the contract -->"

BOUND = 1e-4  # of logits up to 20: a few times what summing float32 in another order was seen to change
SAFE = 100  # every greedy winner leads by so many bounds, so that no such change can reach a token

PROMPTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, "
    "she saw a big dog. The dog was very happy and wanted to play with Lily. They ran and ran",
    "Once upon a time, there was a little girl named Lily. One day",
    "The cat",
    "Tom saw a big dog in the park and",
]
GREEDY = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (12, 24, 28, 16)]
SAMPLED = SamplingParams(max_tokens=20, temperature=0.9, seed=7, ignore_eos=True)
OTHER = SamplingParams(max_tokens=24, ignore_eos=True)
SHUFFLED = random.Random(0).sample(range(512), 512)
SMALL_FOR_4 = {"block_size": 4, "kv_cache_tokens": 160}  # and for another beside n = 4
SMALL = {"block_size": 4, "kv_cache_tokens": 80}  # too little for all four


# --- how a setting is run ------------------------------------------------------------------------------


def row_by_row_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """As `llama.linear`, the product of each row made alone, so that no other row can shift it."""
    return np.array([row @ weight.T for row in x], dtype=np.float32).reshape(len(x), len(weight))


def engine(model: str, row_by_row: bool, options: dict[str, Any]) -> Engine:
    """An engine with ample memory, unless `options` say otherwise."""
    its = Engine(model, **{"kv_cache_tokens": 2048, **options})
    if row_by_row:
        its.llm.engine.model.linear = row_by_row_product
    return its


@dataclass
class Outcome:
    """What is compared, and what is asked whether the setting really did what it says."""

    tokens: list[list[int]]  # of each sequence
    logits: list[Logits]
    preemptions: int = 0
    transfers: Counter[str] = field(default_factory=Counter)
    hits: int = 0  # tokens that were found in the prefix cache

    @staticmethod
    def of(runs: list[Run], hits: int = 0) -> Outcome:
        return Outcome(
            [tokens for run in runs for samples in run.tokens for tokens in samples],
            [logits for run in runs for logits in run.logits],
            sum(run.num_preemptions for run in runs),
            sum((run.transfers for run in runs), start=Counter()),
            hits,
        )


def together(model: str, row_by_row: bool, options: dict[str, Any], times: int = 1) -> Outcome:
    """All requests in one batch; the last of so many times."""
    its = engine(model, row_by_row, options)
    for _ in range(times):
        before = len(its.events)
        run = its.run(PROMPTS, GREEDY)
    return Outcome.of([run], sum(e.length for e in its.events[before:] if isinstance(e, SequenceAdmitted)))


def again(model: str, row_by_row: bool, options: dict[str, Any]) -> Outcome:
    """All requests in one batch, on an engine that has had them before."""
    return together(model, row_by_row, options, times=2)


def alone(model: str, row_by_row: bool, options: dict[str, Any]) -> Outcome:
    """Each request on an engine of its own."""
    each = zip(PROMPTS, GREEDY, strict=True)
    return Outcome.of([engine(model, row_by_row, options).run([prompt], [its]) for prompt, its in each])


def four_samples(model: str, row_by_row: bool, options: dict[str, Any]) -> Outcome:
    """n = 4 with one seed, behind another request."""
    outcome = Outcome.of([engine(model, row_by_row, options).run(PROMPTS[1::-1], [OTHER, replace(SAMPLED, n=4)])])
    return replace(outcome, tokens=outcome.tokens[1:], logits=outcome.logits[1:])


def four_requests(model: str, row_by_row: bool, options: dict[str, Any]) -> Outcome:
    """The same four as requests of their own, with four seeds."""
    params = [OTHER, *(replace(SAMPLED, seed=7 + i) for i in range(4))]
    outcome = Outcome.of([engine(model, row_by_row, options).run([PROMPTS[1], *PROMPTS[:1] * 4], params)])
    merged: Logits = {}
    for logits in outcome.logits[1:]:
        merged |= logits
    return replace(outcome, tokens=outcome.tokens[1:], logits=[merged])


Way = Callable[[str, bool, dict[str, Any]], Outcome]


@cache
def baseline(model: str, row_by_row: bool, backend: str, way: Way = together) -> Outcome:
    """What a setting is held against: blocks of 16, ample memory, nothing shared, no limit to a step."""
    return way(model, row_by_row, {"backend": backend})


# --- the contract --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One run to hold against the baseline."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    way: Way = together
    happened: Callable[[Outcome], bool] = lambda outcome: outcome.preemptions == 0
    against: Way = together


@dataclass(frozen=True)
class Promise:
    """How far logits may be from the baseline's; 0: equal to the bit."""

    logits: float
    cpu: float  # with the weights' products made row by row, on `cpu` and on `cpu-simd`
    reference: float

    @property
    def row_by_row(self) -> dict[str, float]:
        return {"cpu": self.cpu, "cpu-simd": self.cpu, "reference": self.reference}


@dataclass(frozen=True)
class Row:
    """Settings with one promise beside that of identical tokens."""

    varies: str
    settings: tuple[Setting, ...]
    promise: Promise
    why: str


def swapped(outcome: Outcome) -> bool:
    return outcome.preemptions > 0 and min(outcome.transfers[kind] for kind in ("swap_out", "swap_in")) > 0


def recomputed(outcome: Outcome) -> bool:
    return outcome.preemptions > 0 and not {"swap_out", "swap_in"} & outcome.transfers.keys()


def swapped_and_moved(outcome: Outcome) -> bool:
    return swapped(outcome) and outcome.transfers["move"] > 0


def standard(reserve: str) -> Setting:
    return Setting(f"standard, {reserve}", {"manager": "standard", "reserve": reserve})


SAME_SUMS = "each step has the same rows; only the place of K and V differs, and no sum is ordered by place"
OTHER_BATCH = "other tokens share a step, and BLAS orders the sums of a product by its shape"
OTHER_CHUNKS = "the same; besides, `reference` multiplies all queries of a chunk by the keys together"
OTHER_BACKEND = "both take the softmax key by key or block by block, and sum in their own order"

CONTRACT = (
    Row(
        "manager",
        (
            standard("max"),
            standard("pow2"),
            standard("exact"),
            Setting("swapping", {"manager": "swapping"}, happened=lambda outcome: outcome.transfers["move"] > 0),
        ),
        Promise(0, 0, 0),
        SAME_SUMS,
    ),
    Row(
        "block size",
        tuple(Setting(str(size), {"block_size": size}) for size in (1, 2, 4, 16, 64)),
        Promise(0, 0, 0),
        SAME_SUMS,
    ),
    Row(
        "free list",
        (Setting("shuffled", {"block_size": 4, "free_order": SHUFFLED}),),
        Promise(0, 0, 0),
        SAME_SUMS,
    ),
    Row(
        "prefix cache, nothing found",
        (
            Setting("off", {"block_size": 4}),
            Setting("cold", {"block_size": 4, "prefix_cache": True}, happened=lambda outcome: outcome.hits == 0),
        ),
        Promise(0, 0, 0),
        SAME_SUMS,
    ),
    Row(
        "batch",
        (
            Setting("each alone", way=alone),
            Setting("some wait", {"manager": "standard", "reserve": "exact", "kv_cache_tokens": 90}),
        ),
        Promise(BOUND, 0, 0),
        OTHER_BATCH,
    ),
    Row(
        "small pool, swap",
        (
            Setting("paged", {**SMALL, "preemption": "swap"}, happened=swapped),
            Setting("swapping", {"manager": "swapping", "kv_cache_tokens": 96}, happened=swapped_and_moved),
        ),
        Promise(BOUND, 0, 0),
        OTHER_BATCH,
    ),
    Row(
        "small pool, recompute",
        (
            Setting("paged", {**SMALL, "preemption": "recompute"}, happened=recomputed),
            Setting(
                "swapping",
                {"manager": "swapping", "kv_cache_tokens": 96, "preemption": "recompute"},
                happened=recomputed,
            ),
        ),
        Promise(BOUND, 0, BOUND),
        OTHER_CHUNKS,
    ),
    Row(
        "tokens in a step",
        (
            *(Setting(str(count), {"max_batch_tokens": count}) for count in (1, 3, 16)),
            Setting("3 standard", {"max_batch_tokens": 3, "manager": "standard"}),
            Setting("3 swapping", {"max_batch_tokens": 3, "manager": "swapping"}),
        ),
        Promise(BOUND, 0, BOUND),
        OTHER_CHUNKS,
    ),
    Row(
        "prefix cache, something found",
        (
            Setting(
                "within a batch",
                {"block_size": 4, "prefix_cache": True, "max_batch_tokens": 32},
                happened=lambda outcome: 0 < outcome.hits <= 16,
            ),
            Setting("warm", {"block_size": 4, "prefix_cache": True}, again, lambda outcome: outcome.hits >= 64),
            Setting(
                "warm in a small pool",
                {**SMALL, "prefix_cache": True},
                again,
                lambda outcome: outcome.hits > 0 and outcome.preemptions > 0,
            ),
        ),
        Promise(BOUND, 0, BOUND),
        OTHER_CHUNKS,
    ),
    Row(
        "n = 4 with one seed, against four requests with four",
        (
            Setting("paged", {"block_size": 4}, four_samples, against=four_requests),
            Setting("standard", {"manager": "standard"}, four_samples, against=four_requests),
            Setting("paged, swap", {**SMALL_FOR_4, "preemption": "swap"}, four_samples, swapped, four_requests),
            Setting(
                "paged, recompute",
                {**SMALL_FOR_4, "preemption": "recompute"},
                four_samples,
                recomputed,
                four_requests,
            ),
        ),
        Promise(BOUND, 0, BOUND),
        OTHER_CHUNKS,
    ),
    Row(
        "small pool, 7 tokens in a step, shuffled free list, warm prefix cache",
        tuple(
            Setting(
                f"{preemption} {order}",
                {
                    **SMALL,
                    "preemption": preemption,
                    "max_batch_tokens": 7,
                    "prefix_cache": True,
                    "free_order": random.Random(order).sample(range(20), 20),
                },
                again,
                swapped if preemption == "swap" else recomputed,
            )
            for preemption in ("swap", "recompute")
            for order in range(2)
        ),
        Promise(BOUND, 0, BOUND),
        OTHER_CHUNKS,
    ),
)


def table() -> str:
    """The contract as Markdown."""
    lines = [
        "| what varies | settings | logits | row by row, `cpu`, `cpu-simd` | row by row, `reference` | why |",
        "|---|---|---|---|---|---|",
    ]
    for row in CONTRACT:
        promises = [row.promise.logits, row.promise.row_by_row["cpu"], row.promise.row_by_row["reference"]]
        cells = [row.varies, "; ".join(setting.name for setting in row.settings), *map(in_words, promises), row.why]
        lines.append(f"| {' | '.join(cells)} |")
    settings = "`cpu` against `reference`; `cpu-simd` against `reference`"
    lines.append(f"| backend | {settings} | {in_words(BOUND)} | {in_words(BOUND)} | | {OTHER_BACKEND} |")
    return "\n".join(lines) + "\n"


def in_words(bound: float) -> str:
    return f"within {bound:.0e}".replace("e-0", "e-") if bound else "to the bit"


# --- tests ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["tiny", "stories260K"])
def model(request: pytest.FixtureRequest) -> str:
    """Each of the checkpoints."""
    return "tiny" if request.param == "tiny" else str(request.getfixturevalue("stories260k"))


def entries() -> Iterator[Any]:
    """All of the contract. `cpu` has the first setting of each row, and the others in the slow tests: its promises are
    those of `cpu-simd`."""
    for row in CONTRACT:
        for number, setting in enumerate(row.settings):
            for backend in BACKENDS:
                marks = [pytest.mark.slow] * (backend == "cpu" and number > 0)
                yield pytest.param(row, setting, backend, id=f"{row.varies}: {setting.name}-{backend}", marks=marks)


@pytest.mark.parametrize(("row", "setting", "backend"), list(entries()))
def test_tokens_are_identical_and_logits_within_their_bound(
    model: str, row: Row, setting: Setting, backend: str
) -> None:
    for row_by_row in (False, True):
        if row_by_row and on_gpu:
            continue  # the products there are NumPy's
        bound = row.promise.row_by_row[backend] if row_by_row else row.promise.logits
        wanted = baseline(model, row_by_row, backend, setting.against)
        outcome = setting.way(model, row_by_row, {"backend": backend, **setting.options})
        assert setting.happened(outcome)
        assert outcome.tokens == wanted.tokens == baseline(model, False, BACKENDS[0], setting.against).tokens
        assert max(map(furthest, outcome.logits, wanted.logits)) <= bound


@pytest.mark.parametrize("row_by_row", [False, True])
def test_the_backends_give_the_same_tokens_and_logits_within_the_bound(model: str, row_by_row: bool) -> None:
    if row_by_row and on_gpu:
        pytest.skip("the products row by row are NumPy's")
    reference = baseline(model, row_by_row, "reference")
    for backend in BACKENDS:
        outcome = baseline(model, row_by_row, backend)
        assert outcome.tokens == reference.tokens
        assert max(map(furthest, outcome.logits, reference.logits)) <= BOUND


def test_no_greedy_choice_is_so_close_that_rounding_could_turn_it(model: str) -> None:
    assert min(map(narrowest, baseline(model, False, "reference").logits)) > SAFE * BOUND


def test_the_readme_shows_the_contract() -> None:
    text = README.read_text(encoding="utf-8")
    shown = text.partition(BEGIN)[2].partition(END)[0]
    assert shown == table(), "put the output of `python tests/properties/test_equivalence.py` between the two comments"


if __name__ == "__main__":
    print(table(), end="")
