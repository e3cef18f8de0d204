"""Which pages are on the device, which on the host, which on both: pages that move by need, one at a time.

A page is a name (an int) for data of one size, and this module does not look at the data. It decides where each page
lies and which copies that takes; PageStorage makes the copies. A page is in one of three states:

  device   new, or written after it was loaded: there is no other copy
  both     the same on both sides: eviction costs nothing
  host     must be loaded before it can be used

An `EvictionPolicy` decides which page leaves the device when room is needed. Ints only.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from itertools import islice
from typing import Protocol

from ..core.checks import require
from ..core.memory.block_pool import BlockPool, OutOfBlocks
from ..core.memory.manager import OutOfHostBlocks, Transfer
from ..timeline.events import Log, PagesFreed, PagesPlaced, ResidencyOpened

NOWHERE = -1


class EvictionPolicy(Protocol):
    """The order in which pages leave the device. It knows all pages that are there."""

    def used(self, pages: Iterable[int]) -> None:
        """These pages are on the device and were used just now; some may be new there."""

    def left(self, page: int) -> None:
        """The page is no longer on the device."""

    def order(self) -> Iterable[int]:
        """The pages on the device, the first to be evicted first. Read only as far as pages must leave."""


class LeastRecentlyUsed:
    """The page that has not been used for the longest time leaves first."""

    def __init__(self) -> None:
        self._pages: OrderedDict[int, None] = OrderedDict()

    def used(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._pages[page] = None
            self._pages.move_to_end(page)

    def left(self, page: int) -> None:
        del self._pages[page]

    def order(self) -> Iterable[int]:
        return iter(self._pages)


class ByPriority:
    """The page of the lowest priority leaves first; of equal pages, the one that was loaded first.

    `priority` is called when room is needed, so its answers may change at any time. Examples: the position in the
    sequence (evict=sliding), the last score (evict=relevance), and where the order of future uses is known, minus the
    time of the next use (Belady 1966: nothing moves less).
    """

    def __init__(self, priority: Callable[[int], float]) -> None:
        self.priority = priority
        self._pages: dict[int, None] = {}

    def used(self, pages: Iterable[int]) -> None:
        self._pages.update(dict.fromkeys(pages))

    def left(self, page: int) -> None:
        del self._pages[page]

    def order(self) -> Iterable[int]:
        return sorted(self._pages, key=self.priority)


class Residency:
    """Pages on a device of `num_device_blocks` and a host of `num_host_blocks`, each block the size of a page.

    An operation that fails raises OutOfBlocks (the device) or OutOfHostBlocks and changes nothing. An operation that
    returns transfers counts them as made; the caller makes them, in their order, before it touches a page.

    `device_of` and `host_of` have the block of every page, NOWHERE where it has none: arrays of ints, so that NumPy
    can read them without a copy. Do not write to them.
    """

    def __init__(
        self,
        num_device_blocks: int,
        num_host_blocks: int,
        policy: EvictionPolicy | None = None,
        log: Log | None = None,
    ) -> None:
        """`policy`: LeastRecentlyUsed by default."""
        require(num_device_blocks=(num_device_blocks, 1), num_host_blocks=(num_host_blocks, 0))
        self.device = BlockPool(num_device_blocks)  # a reference for the page in a block, and one for each pin
        self.host = BlockPool(num_host_blocks)
        self.policy: EvictionPolicy = LeastRecentlyUsed() if policy is None else policy
        self.log = log
        # Each page takes a block of its own, so there are never more names in use than blocks.
        self._names = BlockPool(num_device_blocks + num_host_blocks)
        self.device_of = array("q", [NOWHERE]) * self._names.num_blocks
        self.host_of = array("q", [NOWHERE]) * self._names.num_blocks
        self._both: dict[int, None] = {}  # pages on both sides, the latest at the end
        self._moved: list[int] = []  # by the operation under way, for its event
        if log:
            log(ResidencyOpened(num_device_blocks, num_host_blocks))

    def clear(self) -> None:
        """End every page, pinned or not, whatever state an interrupted operation left behind."""
        pages = [page for page, places in enumerate(zip(self.device_of, self.host_of, strict=True)) if max(places) >= 0]
        for page in list(self.policy.order()):
            self.policy.left(page)
        for pool in (self.device, self.host, self._names):
            pool.clear()
        for page in pages:
            self.device_of[page] = self.host_of[page] = NOWHERE
        self._both.clear()
        self._moved.clear()
        if self.log and pages:
            self.log(PagesFreed(tuple(pages)))

    # --- room ----------------------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        return self._names.num_blocks - self._names.num_free

    @property
    def capacity(self) -> int:
        """The most pages that there can be. One block stays free: without it no two pages could be exchanged."""
        return self.device.num_blocks + max(0, self.host.num_blocks - 1)

    @property
    def num_pinned(self) -> int:
        """Device blocks whose page cannot leave."""
        return sum(count > 1 for count in self.device.ref_count)

    def _victims(self, count: int, keep: Container[int]) -> list[int]:
        """The first `count` pages to evict that are neither pinned nor in `keep`."""
        if count <= 0:
            return []
        loose = (p for p in self.policy.order() if self.device.ref_count[self.device_of[p]] == 1 and p not in keep)
        return list(islice(loose, count))

    def _make_room(self, count: int, keep: Sequence[int], loads: bool) -> list[int]:
        """The pages to evict so that `count` pages fit on the device, beside the pages of `keep` that are there.

        Pages whose eviction costs nothing come first. `loads`: the `count` pages come from the host; else they are
        new. Raises OutOfBlocks or OutOfHostBlocks; changes nothing in any case.
        """
        missing = count - self.device.num_free
        kept = dict.fromkeys(keep)
        victims = self._victims(missing, kept)
        if len(victims) < missing:
            here = sum(self.device_of[page] >= 0 for page in kept)
            raise OutOfBlocks(
                f"{count + here} pages are needed on the device at the same time; it has {self.device.num_blocks} "
                f"blocks, {self.num_pinned} of them pinned"
            )
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
                f"{dirty} pages must leave the device, which has no other copy of them; the host has "
                f"{self.host.num_blocks} blocks, and {room} of them can be used"
            )
        return sorted(victims, key=lambda page: page not in self._both)

    # --- operations ----------------------------------------------------------------------------------

    def add(self, count: int = 1) -> tuple[list[int], list[Transfer]]:
        """Make `count` new pages on the device, with nothing in them yet. Returns their names, and what must be copied
        first. Raises OutOfBlocks, OutOfHostBlocks."""
        if self.num_pages + count > self.capacity:
            raise OutOfHostBlocks(
                f"{count} pages to add to {self.num_pages}; {self.device.num_blocks} device and "
                f"{self.host.num_blocks} host blocks hold {self.capacity}"
            )
        victims = self._make_room(count, (), loads=False)
        transfers = self._evict(victims)
        pages = [self._names.allocate() for _ in range(count)]
        for page in pages:
            self.device_of[page] = self.device.allocate()
        self.policy.used(pages)
        self._log_places(pages)
        return pages, transfers

    def need(self, pages: Iterable[int]) -> list[Transfer]:
        """Load these pages to the device, where they stay until others need the room (`pin` keeps them there).
        Returns what must be copied. Raises OutOfBlocks, OutOfHostBlocks."""
        wanted = list(dict.fromkeys(pages))
        missing = [page for page in wanted if self.device_of[page] < 0]
        transfers: list[Transfer] = []
        if missing:
            victims = self._make_room(len(missing), wanted, loads=True)
            for page in missing:
                while victims and self._can_evict(victims[0]):  # mostly all, before the first is loaded
                    transfers += self._evict([victims.pop(0)])
                self.device_of[page] = self.device.allocate()
                self._both[page] = None
                transfers.append(Transfer("swap_in", self.host_of[page], self.device_of[page]))
        self.policy.used(wanted)
        self._log_places(missing)
        return transfers

    def prefetch(self, pages: Iterable[int]) -> list[Transfer]:
        """Like `need`, for as many of the leading pages as there is room for beside the pinned pages. Never raises:
        pages that do not fit yet are loaded on demand."""
        wanted = list(dict.fromkeys(pages))
        room = self.device.num_blocks - self.num_pinned
        fitting: list[int] = []
        for page in wanted:
            pinned = self.device_of[page] >= 0 and self.device.ref_count[self.device_of[page]] > 1
            room -= not pinned
            if room < 0:
                break
            fitting.append(page)
        try:
            return self.need(fitting)
        except OutOfHostBlocks:
            return []

    def pin(self, pages: Iterable[int]) -> None:
        """Keep these pages, all on the device, there until each is unpinned as often as it was pinned."""
        for page in self._on_device(pages):
            self.device.share(self.device_of[page])

    def unpin(self, pages: Iterable[int]) -> None:
        """Take back one `pin` of each page. Raises ValueError, and changes nothing, if a page has none."""
        pages = self._on_device(pages)
        for page, count in Counter(pages).items():
            pins = self.device.ref_count[self.device_of[page]] - 1
            if count > pins:
                raise ValueError(f"page {page} is pinned {pins} times; it cannot be unpinned {count} times")
        for page in pages:
            self.device.release(self.device_of[page])

    def written(self, pages: Iterable[int]) -> None:
        """These pages, all on the device, have changed: drop their copies on the host, which are out of date."""
        stale = [page for page in dict.fromkeys(self._on_device(pages)) if page in self._both]
        for page in stale:
            self._drop_host_copy(page)
        self._log_places(stale)

    def free(self, pages: Iterable[int]) -> None:
        """End these pages, wherever they lie. Raises ValueError, and changes nothing, if a page is pinned."""
        pages = list(dict.fromkeys(pages))
        for page in pages:
            block = self.device_of[page]
            if block < 0 and self.host_of[page] < 0:
                raise ValueError(f"page {page} is nowhere; it cannot be freed")
            if block >= 0 and self.device.ref_count[block] > 1:
                raise ValueError(f"page {page} is pinned; it cannot be freed")
        for page in reversed(pages):  # the first page is the next to be handed out
            if self.host_of[page] >= 0:
                self._both.pop(page, None)
                self.host.release(self.host_of[page])
                self.host_of[page] = NOWHERE
            if self.device_of[page] >= 0:
                self._leave(page)
            self._names.release(page)
        if self.log and pages:
            self.log(PagesFreed(tuple(pages)))

    # --- moves ---------------------------------------------------------------------------------------

    def _can_evict(self, page: int) -> bool:
        return page in self._both or self.host.num_free > 0 or len(self._both) > 0

    def _evict(self, victims: Sequence[int]) -> list[Transfer]:
        """Evict these pages; a page without a copy on the host is copied there."""
        transfers = []
        for page in victims:
            if page in self._both:
                del self._both[page]
            else:
                if not self.host.num_free:  # give up a second copy
                    self._drop_host_copy(next(reversed(self._both)))
                self.host_of[page] = self.host.allocate()
                transfers.append(Transfer("swap_out", self.device_of[page], self.host_of[page]))
            self._leave(page)
            self._moved.append(page)
        return transfers

    def _leave(self, page: int) -> None:
        self.device.release(self.device_of[page])
        self.device_of[page] = NOWHERE
        self.policy.left(page)

    def _drop_host_copy(self, page: int) -> None:
        del self._both[page]
        self.host.release(self.host_of[page])
        self.host_of[page] = NOWHERE
        self._moved.append(page)

    def _on_device(self, pages: Iterable[int]) -> list[int]:
        pages = list(pages)
        for page in pages:
            if self.device_of[page] < 0:
                raise ValueError(f"page {page} is not on the device")
        return pages

    def _log_places(self, pages: Iterable[int]) -> None:
        """Log where these pages are now, and all others that the operation moved."""
        moved, self._moved = self._moved, []
        if self.log and (pages := tuple(dict.fromkeys([*moved, *pages]))):
            self.log(PagesPlaced(pages, tuple(self.device_of[p] for p in pages), tuple(self.host_of[p] for p in pages)))

    # --- looking -------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError if a block is lost or has two pages, or a page is nowhere."""
        used = [page for page, count in enumerate(self._names.ref_count) if count]
        self._names.check_integrity(used)
        here = [page for page in used if self.device_of[page] >= 0]
        pins = [self.device_of[p] for p in here for _ in range(self.device.ref_count[self.device_of[p]] - 1)]
        self.device.check_integrity([*(self.device_of[page] for page in here), *pins])
        self.host.check_integrity(self.host_of[page] for page in used if self.host_of[page] >= 0)
        for page in range(self._names.num_blocks):
            somewhere = self.device_of[page] >= 0 or self.host_of[page] >= 0
            if somewhere != bool(self._names.ref_count[page]):
                raise AssertionError(f"page {page} is {'in no use, but ' * somewhere or 'in use, and no'}where")
        if sorted(self._both) != [page for page in here if self.host_of[page] >= 0]:
            raise AssertionError(f"pages {sorted(self._both)} are said to be on both sides, and are not")
        if sorted(self.policy.order()) != here:
            raise AssertionError("the policy's pages are not those on the device")
