"""Where each page is of the sequences that are longer than the device (`paged-ref long`), as the log says it."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import events

PageEvent = events.ResidencyOpened | events.PagesPlaced | events.PagesFreed | events.PagesNamed


@dataclass(slots=True)
class PageState:
    """The pages of sequences that are longer than the device: where each page is, and which sequence has it."""

    num_device_blocks: int = 0
    num_host_blocks: int = 0
    places: dict[int, tuple[int, int]] = field(default_factory=dict)  # page -> device block, host block; -1: not there
    tables: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)  # (sequence, layer, KV head) -> pages

    def copy(self) -> PageState:
        tables = {key: pages.copy() for key, pages in self.tables.items()}
        return PageState(self.num_device_blocks, self.num_host_blocks, self.places.copy(), tables)

    def apply(self, event: PageEvent) -> None:
        match event:
            case events.ResidencyOpened():
                self.num_device_blocks, self.num_host_blocks = event.num_device_blocks, event.num_host_blocks
            case events.PagesPlaced():
                self._place(event)
            case events.PagesFreed():
                for page in event.pages:
                    del self.places[page]
            case events.PagesNamed():
                self.tables.setdefault((event.seq_id, event.layer, event.head), []).extend(event.pages)

    def _place(self, event: events.PagesPlaced) -> None:
        """All pages leave their old places before one comes to its new place."""
        for page in event.pages:
            self.places.pop(page, None)
        new = {page: (d, h) for page, d, h in zip(event.pages, event.device_blocks, event.host_blocks, strict=True)}
        for side, total in ((0, self.num_device_blocks), (1, self.num_host_blocks)):
            wanted = [place[side] for place in new.values() if place[side] >= 0]
            if any(block >= total for block in wanted):
                raise ValueError(f"block {max(wanted)} is not among the {total}")
            taken = {place[side] for place in self.places.values()} if wanted else set()
            twice = [block for i, block in enumerate(wanted) if block in taken or block in wanted[:i]]
            if twice:
                raise ValueError(f"{('device', 'host')[side]} block {twice[0]} has two pages")
        self.places.update(new)

    def end(self, seq_id: int) -> None:
        """The sequence has no pages any more."""
        for key in [key for key in self.tables if key[0] == seq_id]:
            del self.tables[key]
