"""Which pages are on the device, which on the host, which on both: pages that move by need, one at a time.

A page is a name (an int) for data of one size; what lies in it this module does not know. It decides where the
page is and which copies that takes, and KVStorage.apply, or anyone who reads a `Transfer`, makes them. Three
states, and no flag beside them:

  device   new, or written since it came: there is no other copy
  both     the same on both sides: leaving the device costs nothing
  host     has to come back before it can be used

Who leaves when room is needed, an `EvictionPolicy` says. Ints only.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from itertools import islice
from typing import Protocol

from ..core.memory.block_pool import BlockPool, OutOfBlocks
from ..core.memory.manager import OutOfHostBlocks, Transfer
from ..timeline.events import Log, PagesFreed, PagesPlaced, ResidencyOpened

NOWHERE = -1


class EvictionPolicy(Protocol):
    """Who leaves the device first. Is told of every page there."""

    def used(self, pages: Iterable[int]) -> None:
        """These pages are on the device and were asked for just now; some may be new there."""

    def left(self, page: int) -> None:
        """The page is no longer on the device."""

    def order(self) -> Iterable[int]:
        """The pages on the device, the first to leave first. Read only as far as pages must leave."""


class LeastRecentlyUsed:
    """The page that was not asked for the longest time leaves first."""

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
    """The page of the lowest priority leaves first; of equals, the one that came first.

    `priority` is asked when room is needed, so it may change at any time. Whoever uses the pages knows what
    they are: sliding is their position in the sequence, relevance the last score, and where the order of
    future needs is known, minus the next one (Belady 1966: nothing moves less).
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

    Operations that can fail do all or nothing: they raise OutOfBlocks (the device) or OutOfHostBlocks and
    change nothing. Those that return transfers count them as made; the caller makes them, in their order,
    before it touches a page.

    `device_of` and `host_of` have the block of every page, NOWHERE where it has none: arrays of ints, so that
    NumPy can look through them without a copy. Do not write to them.
    """

    def __init__(
        self,
        num_device_blocks: int,
        num_host_blocks: int,
        policy: EvictionPolicy | None = None,
        log: Log | None = None,
    ) -> None:
        """`policy`: LeastRecentlyUsed by default."""
        if num_device_blocks < 1:
            raise ValueError(f"num_device_blocks is {num_device_blocks}; at least 1 is needed")
        if num_host_blocks < 0:
            raise ValueError(f"num_host_blocks is {num_host_blocks}; at least 0 is needed")
        self.device = BlockPool(num_device_blocks)  # a reference for the page that is there, and one for each pin
        self.host = BlockPool(num_host_blocks)
        self.policy: EvictionPolicy = LeastRecentlyUsed() if policy is None else policy
        self.log = log
        # A page that is somewhere takes a block of its own, so there are never more names in use than blocks.
        self._names = BlockPool(num_device_blocks + num_host_blocks)
        self.device_of = array("q", [NOWHERE]) * self._names.num_blocks
        self.host_of = array("q", [NOWHERE]) * self._names.num_blocks
        self._both: dict[int, None] = {}  # pages on both sides, the last to become so at the end
        self._moved: list[int] = []  # by the operation under way; told in its event
        if log:
            log(ResidencyOpened(num_device_blocks, num_host_blocks))

    # --- room ----------------------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        return self._names.num_blocks - self._names.num_free

    @property
    def capacity(self) -> int:
        """The most pages that there can be. One block stays free: without it no two could change places."""
        return self.device.num_blocks + max(0, self.host.num_blocks - 1)

    @property
    def num_pinned(self) -> int:
        """Device blocks whose page cannot leave."""
        return sum(count > 1 for count in self.device.ref_count)

    def _victims(self, count: int, keep: Container[int]) -> list[int]:
        """The `count` pages that leave, of those that are neither pinned nor in `keep`."""
        if count <= 0:
            return []
        loose = (p for p in self.policy.order() if self.device.ref_count[self.device_of[p]] == 1 and p not in keep)
        return list(islice(loose, count))

    def _make_room(self, count: int, keep: Sequence[int], comes_from_host: bool) -> list[int]:
        """Victims so that `count` pages can come to the device beside those of `keep` that are there.

        Those whose leaving costs nothing come first. Raises OutOfBlocks or OutOfHostBlocks; changes nothing in
        any case.
        """
        missing = count - self.device.num_free
        kept = dict.fromkeys(keep)
        victims = self._victims(missing, kept)
        if len(victims) < missing:
            here = sum(self.device_of[page] >= 0 for page in kept)
            raise OutOfBlocks(
                f"{count + here} pages are needed on the device at once; it has {self.device.num_blocks} blocks, "
                f"{self.num_pinned} of them pinned"
            )
        clean = sum(page in self._both for page in victims)
        dirty = len(victims) - clean
        room = self.host.num_free + len(self._both) - clean
        lacks = dirty > room
        if comes_from_host:
            # Who comes leaves a copy behind, whose host block the next one to leave can take. So they can change
            # places one by one, if only the first finds a block on either side.
            lacks = dirty > 0 and room + clean + min(count, self.device.num_free) == 0
        if lacks:
            raise OutOfHostBlocks(
                f"{dirty} pages must leave the device, which has no other copy of them; the host has "
                f"{self.host.num_blocks} blocks, and {room} of them can be had"
            )
        return sorted(victims, key=lambda page: page not in self._both)

    # --- operations ----------------------------------------------------------------------------------

    def add(self, count: int = 1) -> tuple[list[int], list[Transfer]]:
        """`count` new pages on the device, with nothing in them yet. Returns their names, and what must be
        copied first. Raises OutOfBlocks, OutOfHostBlocks."""
        if self.num_pages + count > self.capacity:
            raise OutOfHostBlocks(
                f"{count} pages to add to {self.num_pages}; {self.device.num_blocks} device and "
                f"{self.host.num_blocks} host blocks hold {self.capacity}"
            )
        victims = self._make_room(count, (), comes_from_host=False)
        transfers = self._evict(victims)
        pages = [self._names.allocate() for _ in range(count)]
        for page in pages:
            self.device_of[page] = self.device.allocate()
        self.policy.used(pages)
        self._tell(pages)
        return pages, transfers

    def need(self, pages: Iterable[int]) -> list[Transfer]:
        """Bring these pages to the device, where they stay until others need the room (`pin` holds them).
        Returns what must be copied. Raises OutOfBlocks, OutOfHostBlocks."""
        wanted = list(dict.fromkeys(pages))
        missing = [page for page in wanted if self.device_of[page] < 0]
        transfers: list[Transfer] = []
        if missing:
            victims = self._make_room(len(missing), wanted, comes_from_host=True)
            for page in missing:
                while victims and self._can_leave(victims[0]):  # mostly all of them, before the first comes
                    transfers += self._evict([victims.pop(0)])
                self.device_of[page] = self.device.allocate()
                self._both[page] = None
                transfers.append(Transfer("swap_in", self.host_of[page], self.device_of[page]))
        self.policy.used(wanted)
        self._tell(missing)
        return transfers

    def prefetch(self, pages: Iterable[int]) -> list[Transfer]:
        """Like `need`, for as many of the leading pages as there is room for beside the pinned ones. Never
        raises: who comes too early for the room is brought in when it is needed."""
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
        """These pages, all on the device, cannot leave until each is unpinned as often as it was pinned."""
        for page in self._on_device(pages):
            self.device.share(self.device_of[page])

    def unpin(self, pages: Iterable[int]) -> None:
        pages = self._on_device(pages)
        for page, count in Counter(pages).items():
            pins = self.device.ref_count[self.device_of[page]] - 1
            if count > pins:
                raise ValueError(f"page {page} is pinned {pins} times; it cannot be unpinned {count} times")
        for page in pages:
            self.device.release(self.device_of[page])

    def written(self, pages: Iterable[int]) -> None:
        """These pages, all on the device, have changed: a copy on the host is worth nothing any more."""
        stale = [page for page in dict.fromkeys(self._on_device(pages)) if page in self._both]
        for page in stale:
            self._drop_host_copy(page)
        self._tell(stale)

    def free(self, pages: Iterable[int]) -> None:
        """These pages are gone, wherever they are. Raises ValueError, and changes nothing, if one is pinned."""
        pages = list(dict.fromkeys(pages))
        for page in pages:
            block = self.device_of[page]
            if block < 0 and self.host_of[page] < 0:
                raise ValueError(f"page {page} is nowhere; it cannot be freed")
            if block >= 0 and self.device.ref_count[block] > 1:
                raise ValueError(f"page {page} is pinned; it cannot be freed")
        for page in reversed(pages):  # the first is handed out again first
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

    def _can_leave(self, page: int) -> bool:
        return page in self._both or self.host.num_free > 0 or len(self._both) > 0

    def _evict(self, victims: Sequence[int]) -> list[Transfer]:
        """They leave the device: without a copy where there is one on the host, else to a host block."""
        transfers = []
        for page in victims:
            if page in self._both:
                del self._both[page]
            else:
                if not self.host.num_free:  # a second copy is a convenience, and given up
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

    def _tell(self, pages: Iterable[int]) -> None:
        """Where these pages are now, and all others that the operation moved."""
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
