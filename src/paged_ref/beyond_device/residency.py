"""Which pages are on the device, which on the host, which on both: pages that move by need, one at a time.

A page is a name (an int) for data of one size, and this module does not look at the data. It decides where each page
lies and which copies that takes; PageStorage makes the copies. A page is in one of three states:

  device   new, or written after it was loaded: there is no other copy
  both     the same on both sides: eviction costs nothing
  host     must be loaded before it can be used

Ints only.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from .. import timeline
from ..core.checks import plural, require
from ..core.memory.block_pool import BlockPool, OutOfBlocks
from ..core.memory.manager import OutOfHostBlocks, Transfer

if TYPE_CHECKING:
    from ..timeline.events import Log

NOWHERE = -1
Priority = Callable[[int], float]  # of a page


class Residency:
    """Pages on a device of `num_device_blocks` and a host of `num_host_blocks`, each block the size of a page.

    An operation that fails raises OutOfBlocks (the device) or OutOfHostBlocks and changes nothing. An operation that
    returns transfers counts them as made; the caller makes them, in their order, before it touches a page.

    `device_of` and `host_of` have the block of every page, NOWHERE where it has none: arrays of ints, so that NumPy
    can read them without a copy. Do not write to them.
    """

    def __init__(
        self, num_device_blocks: int, num_host_blocks: int, priority: Priority | None = None, log: Log | None = None
    ) -> None:
        """When room is needed, the page of the lowest `priority` leaves the device first; of equal pages, the page that
        was loaded first. Without a priority, the page leaves first that has not been used for the longest time.

        `priority` is called when room is needed, so its answers may change at any time. Where the order of future uses
        is known, minus the time of the next use is best (Belady 1966: nothing moves less).
        """
        require(num_device_blocks=(num_device_blocks, 1), num_host_blocks=(num_host_blocks, 0))
        self.device = BlockPool(num_device_blocks)
        self.host = BlockPool(num_host_blocks)
        self._priority = priority
        self._here: dict[int, None] = {}  # pages on the device: as loaded with a priority, else as used last
        self.log = log
        # Each page takes a block of its own, so there are never more names in use than blocks.
        self._names = BlockPool(num_device_blocks + num_host_blocks)
        self.device_of = array("q", [NOWHERE]) * self._names.num_blocks
        self.host_of = array("q", [NOWHERE]) * self._names.num_blocks
        self._both: dict[int, None] = {}  # pages on both sides, the latest at the end
        self._moved: list[int] = []  # by the operation under way, for its event
        if log:
            log(timeline.events.ResidencyOpened(num_device_blocks, num_host_blocks))

    def clear(self) -> None:
        """End every page, whatever state an interrupted operation left behind."""
        pages = [page for page, places in enumerate(zip(self.device_of, self.host_of, strict=True)) if max(places) >= 0]
        for pool in (self.device, self.host, self._names):
            pool.clear()
        for page in pages:
            self.device_of[page] = self.host_of[page] = NOWHERE
        self._here.clear()
        self._both.clear()
        self._moved.clear()
        if self.log and pages:
            self.log(timeline.events.PagesFreed(tuple(pages)))

    # --- room ----------------------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        return self._names.num_blocks - self._names.num_free

    @property
    def capacity(self) -> int:
        """The most pages that there can be. One block stays free: without it no two pages could be exchanged."""
        return self.device.num_blocks + max(0, self.host.num_blocks - 1)

    def eviction_order(self) -> Iterable[int]:
        """The pages on the device, the page that is evicted first at the front."""
        return iter(self._here) if self._priority is None else sorted(self._here, key=self._priority)

    def _make_room(self, count: int, keep: Iterable[int], loads: bool) -> list[int]:
        """The pages to evict so that `count` pages fit on the device, beside the pages of `keep` that are there.

        Pages whose eviction costs nothing come first. `loads`: the `count` pages come from the host; else they are
        new. Raises OutOfBlocks or OutOfHostBlocks; changes nothing in any case.
        """
        missing = max(0, count - self.device.num_free)
        kept = set(keep)
        victims = list(islice((page for page in self.eviction_order() if page not in kept), missing)) if missing else []
        if len(victims) < missing:
            here = sum(self.device_of[page] >= 0 for page in kept)
            needed = f"{plural(count + here, 'page')} needed on the device at the same time"
            raise OutOfBlocks(f"{needed}; the device has {plural(self.device.num_blocks, 'block')}")
        clean = sum(page in self._both for page in victims)
        dirty = len(victims) - clean
        room = self.host.num_free + len(self._both) - clean
        lacks = dirty > room
        if loads:
            # A page that is loaded frees its host block for the next page that is evicted. So pages can be exchanged
            # one by one, given one free block on either side.
            lacks = dirty > 0 and room + clean + min(count, self.device.num_free) == 0
        if lacks:
            raise OutOfHostBlocks(
                f"{plural(dirty, 'page')} without a copy must leave the device; the host has "
                f"{plural(self.host.num_blocks, 'block')}, with {room} for use"
            )
        return sorted(victims, key=lambda page: page not in self._both)

    # --- operations ----------------------------------------------------------------------------------

    def add(self, count: int = 1, keep: Iterable[int] = ()) -> tuple[list[int], list[Transfer]]:
        """Make `count` new pages on the device, with nothing in them yet; pages of `keep` that are there stay there.
        Returns the names of the new pages, and what must be copied first. Raises OutOfBlocks, OutOfHostBlocks."""
        if self.num_pages + count > self.capacity:
            raise OutOfHostBlocks(
                f"{plural(count, 'page')} to add to {self.num_pages}; the room is {self.capacity}, with "
                f"{self.device.num_blocks} blocks on the device and {self.host.num_blocks} on the host"
            )
        transfers = self._evict(self._make_room(count, keep, loads=False))
        pages = [self._names.allocate() for _ in range(count)]
        for page in pages:
            self.device_of[page] = self.device.allocate()
        self._use(pages)
        self._log_places(pages)
        return pages, transfers

    def need(self, pages: Iterable[int]) -> list[Transfer]:
        """Load these pages to the device, where they stay until others need the room. Returns what must be copied.
        Raises OutOfBlocks, OutOfHostBlocks."""
        wanted = list(dict.fromkeys(pages))
        missing = [page for page in wanted if self.device_of[page] < 0]
        transfers: list[Transfer] = []
        if missing:
            victims = self._make_room(len(missing), wanted, loads=True)
            for page in missing:
                while victims and (self.host.num_free or self._both):  # mostly all, before the first is loaded
                    transfers += self._evict([victims.pop(0)])
                self.device_of[page] = self.device.allocate()
                self._both[page] = None
                transfers.append(Transfer("swap_in", self.host_of[page], self.device_of[page]))
        self._use(wanted)
        self._log_places(missing)
        return transfers

    def prefetch(self, pages: Iterable[int]) -> list[Transfer]:
        """Like `need`, for as many of the leading pages as the device holds. Never raises: pages that do not fit yet
        are loaded on demand."""
        try:
            return self.need(islice(dict.fromkeys(pages), self.device.num_blocks))
        except OutOfHostBlocks:
            return []

    def written(self, pages: Iterable[int]) -> None:
        """These pages, all on the device, have changed: drop their copies on the host, which are out of date."""
        pages = dict.fromkeys(pages)
        for page in pages:
            if self.device_of[page] < 0:
                raise ValueError(f"page {page} is not on the device")
        stale = [page for page in pages if page in self._both]
        for page in stale:
            self._drop_host_copy(page)
        self._log_places(stale)

    def free(self, pages: Iterable[int]) -> None:
        """End these pages, wherever they lie. Raises ValueError, and changes nothing, if a page is nowhere."""
        pages = list(dict.fromkeys(pages))
        for page in pages:
            if self.device_of[page] < 0 and self.host_of[page] < 0:
                raise ValueError(f"page {page} is nowhere; it cannot be freed")
        for page in reversed(pages):  # the first page is the next to be handed out
            if self.host_of[page] >= 0:
                self._drop_host_copy(page)
            if self.device_of[page] >= 0:
                self._leave(page)
            self._names.release(page)
        if self.log and pages:
            self.log(timeline.events.PagesFreed(tuple(pages)))

    # --- moves ---------------------------------------------------------------------------------------

    def _evict(self, victims: Sequence[int]) -> list[Transfer]:
        """Evict these pages; a page without a copy on the host is copied there."""
        transfers = []
        for page in victims:
            if page in self._both:
                del self._both[page]
            else:
                if not self.host.num_free:  # give up a second copy
                    self._moved.append(next(reversed(self._both)))
                    self._drop_host_copy(self._moved[-1])
                self.host_of[page] = self.host.allocate()
                transfers.append(Transfer("swap_out", self.device_of[page], self.host_of[page]))
            self._leave(page)
            self._moved.append(page)
        return transfers

    def _leave(self, page: int) -> None:
        self.device.release(self.device_of[page])
        self.device_of[page] = NOWHERE
        del self._here[page]

    def _drop_host_copy(self, page: int) -> None:
        self._both.pop(page, None)
        self.host.release(self.host_of[page])
        self.host_of[page] = NOWHERE

    def _use(self, pages: Iterable[int]) -> None:
        """These pages are on the device, and are used now."""
        for page in pages:
            if self._priority is None:
                self._here.pop(page, None)
            self._here[page] = None

    def _log_places(self, pages: Iterable[int]) -> None:
        """Log where these pages are now, and all others that the operation moved."""
        moved, self._moved = self._moved, []
        if self.log and (pages := tuple(dict.fromkeys([*moved, *pages]))):
            self.log(
                timeline.events.PagesPlaced(
                    pages, tuple(self.device_of[p] for p in pages), tuple(self.host_of[p] for p in pages)
                )
            )

    # --- looking -------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError if a block is lost or has two pages, or a page is nowhere."""
        used = [page for page, count in enumerate(self._names.ref_count) if count]
        self._names.check_integrity(used)
        here = [page for page in used if self.device_of[page] >= 0]
        self.device.check_integrity(self.device_of[page] for page in here)
        self.host.check_integrity(self.host_of[page] for page in used if self.host_of[page] >= 0)
        for page in range(self._names.num_blocks):
            somewhere = self.device_of[page] >= 0 or self.host_of[page] >= 0
            if somewhere != bool(self._names.ref_count[page]):
                raise AssertionError(f"page {page} is {'in no use, but ' * somewhere or 'in use, and no'}where")
        if sorted(self._both) != [page for page in here if self.host_of[page] >= 0]:
            raise AssertionError(f"pages {sorted(self._both)} are said to be on both sides, and are not")
        if sorted(self._here) != here:
            raise AssertionError(f"pages {sorted(self._here)} are said to be on the device; it has {here}")
