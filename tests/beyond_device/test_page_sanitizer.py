"""The sanitizer of pages catches planted bugs, and says which page is wrong and where it lies."""

from __future__ import annotations

from typing import Any

import pytest
from support.driving import Engine

from paged_ref import SamplingParams
from paged_ref.beyond_device import attention
from paged_ref.beyond_device.kv import StreamedKV
from paged_ref.beyond_device.observation import HeadPages
from paged_ref.beyond_device.storage import PageStorage
from paged_ref.extras.sanitizer import SanitizerError

PROMPTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw",
    "Four score and seven years ago our",
]
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


def forgets_a_copy_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PageStorage.apply

    def apply(self: PageStorage, transfers: Any) -> tuple[int, int]:
        return right(self, [t for t in transfers if t.kind != "swap_out" or t.destination != 3])

    monkeypatch.setattr(PageStorage, "apply", apply)


def copies_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PageStorage.apply
    monkeypatch.setattr(PageStorage, "apply", lambda self, transfers: right(self, list(transfers)[::-1]))


def keeps_the_host_copy_of_a_written_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paged_ref.beyond_device.residency.Residency.written", lambda self, pages: None)


def takes_the_table_of_the_next_head(monkeypatch: pytest.MonkeyPatch) -> None:
    right = StreamedKV._all_pages

    def all_pages(self: StreamedKV, layer: int, window: int | None) -> list[HeadPages]:
        reads, num_seqs = right(self, layer, window), len(self._chunks)
        others = reads[num_seqs:] + reads[:num_seqs]
        return [read._replace(pages=other.pages) for read, other in zip(reads, others, strict=True)]

    monkeypatch.setattr(StreamedKV, "_all_pages", all_pages)


def stages_into_the_half_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._Stager.fetch

    def always_the_first(self: Any, *args: Any) -> Any:
        self._next = 0
        return right(self, *args)

    monkeypatch.setattr(attention._Stager, "fetch", always_the_first)


BUGS = [
    (forgets_a_copy_to_the_host, {}, "not what was written"),
    (copies_in_the_wrong_order, {}, "not what was written"),
    (keeps_the_host_copy_of_a_written_page, {}, "not what was written"),
    (takes_the_table_of_the_next_head, {}, "what was written there is of sequence"),
    (stages_into_the_half_that_is_read, {"staging_pages": 4}, "not what was written"),
]


@pytest.mark.parametrize(("bug", "options", "words"), BUGS, ids=lambda x: getattr(x, "__name__", ""))
def test_the_sanitizer_catches(bug: Any, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine("tiny", device_blocks=2, block_size=4, **options)
    bug(monkeypatch)
    with pytest.raises(SanitizerError, match=r"reads position \d+ of layer \d, KV head \d from page \d+ in .*" + words):
        engine.run(PROMPTS, GREEDY)
