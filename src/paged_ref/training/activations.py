"""Who keeps what the layers save for backward: four answers to one question, and what each costs.

`Keep` holds everything on the device. `Recompute` holds each layer's input, and runs the layer once more.
`Swap` holds what the budget allows, in whole layers, and sends the others to the host. `Paged` cuts what is
saved into pages of one size, and lets the pages leave and come back one by one: the same Residency as for
the KV cache decides which. Backward asks for layers from the last to the first, so whoever must leave is
the lowest layer, which is needed last (Belady 1966), and what comes back is fetched a layer ahead.

The budget is for saved activations. The layer that is computed just now has its arrays beside it, in all
four. All give the same gradients to the bit: bytes are moved, and never changed.

What paging is worth in training
--------------------------------
The paper's problem is not there. A KV cache grows by a token at a time to a length that nobody knows, so a
reservation wastes most of what it reserves. A training step knows the size of every tensor before it begins,
frees in the opposite order of allocation, and reads each tensor once: a stack has no holes to close. In the
table that `paged-ref bench training` prints:

* Pages use a budget to its last page, whole layers only to the last layer that fits. With the budget at half
  of what five layers save, swapping holds 2 layers and moves 3; pages hold 2.5 and move 2.5, a sixth less. At
  three quarters it is 2 against 1.25 layers. With a page as large as a layer the two move the same bytes. The
  gain is at most one layer out and in, whatever the depth; so, by this reasoning, it matters for few and large
  layers.
* Pages cost a copy that swapping does not have. Products of matrices want a tensor in one piece, so it is
  copied into its pages and out of them, also where nothing leaves the device, and for one layer there are
  both copies. An attention kernel reads through a block table; BLAS does not.
  On a CPU, where moving is a copy in memory, neither shows beside the noise of a step: 0.94 to 0.99 times the time
  of `keep` (lessons/recorded/bench_training.txt).
* Recompute holds least, a tenth of all here, and moves nothing, for one more forward: a fifth longer.
  Reasoning, not measured: where a link moves bytes more slowly than the device makes them again, it wins. The
  bytes that a layer saves for each token grow with hidden_size, its work with hidden_size squared: so wide layers
  are cheap to move beside their work, and narrow ones, as here, are cheap to run again.

What is used in practice says the same. Checkpointing (Chen et al. 2016) is in every framework; vDNN (Rhu et
al. 2016) moved whole layers; ZeRO-Offload (Ren et al. 2021) moves gradients and optimizer state, of which
there is more, and which are touched once in a step. Pages in training are there for the optimizer: QLoRA
(Dettmers et al. 2023) lets the driver page its state out when a long sequence makes a peak, for the reason
that inference has: nobody knows when it comes. So, of an article that says PagedAttention manages data
"during model training": it can, this module does, and there is little to win.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..beyond_device.residency import ByPriority, Residency
from ..core.device import Array, xp
from ..core.memory.kv import pinned
from ..core.memory.manager import Transfer
from ..core.model.config import ModelConfig
from .copies import CopyStream
from .network import Saved, saved_shapes

MEMORY = ("keep", "swap", "page", "recompute")
PAGE_SIZE = 64 * 1024  # bytes


def activations_for(
    memory: str, config: ModelConfig, most_tokens: int, budget: int | None = None, page_size: int = PAGE_SIZE
) -> Keep | Swap | Paged:
    """One of MEMORY. `budget` and `page_size` in bytes, `most_tokens` the most that a forward ever has.

    Raises ValueError for a budget that is missing, or smaller than a page, or given to who has no use for it.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory is {memory!r}; known are {', '.join(MEMORY)}")
    if memory in ("keep", "recompute"):
        if budget is not None:
            raise ValueError(f"a budget is given to {memory}, which keeps to none; swap and page do")
        return Keep() if memory == "keep" else Recompute()
    if budget is None:
        raise ValueError(f"the budget is missing; {memory} needs one")
    if memory == "swap":
        return Swap(budget, config, most_tokens)
    return Paged(budget, page_size, config, most_tokens)


@dataclass
class Counts:
    """What was held and moved since it was last cleared. All in bytes."""

    held: int = 0  # on the device now
    peak: int = 0  # the most that was held at a time
    moved_out: int = 0  # device to host
    moved_in: int = 0  # host to device

    def hold(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)

    def clear(self) -> None:
        self.peak, self.moved_out, self.moved_in = self.held, 0, 0


class Keep:
    """All of it stays on the device, as training does without further thought."""

    recompute = False

    def __init__(self) -> None:
        self.counts = Counts()
        self._saved: dict[int, Saved] = {}

    def save(self, layer: int, saved: Saved) -> None:
        self._saved[layer] = saved
        self.counts.hold(nbytes(saved))

    def load(self, layer: int) -> Saved:
        return self._saved[layer]

    def release(self, layer: int) -> None:
        self.counts.hold(-nbytes(self._saved.pop(layer)))


class Recompute(Keep):
    """The same, but layers save their input alone (Chen et al. 2016, with every layer a checkpoint)."""

    recompute = True


class Swap:
    """Whole layers go to the host when the budget is full, and come back whole (vDNN: Rhu et al. 2016)."""

    recompute = False

    def __init__(self, budget: int, config: ModelConfig, most_tokens: int, itemsize: int = 4) -> None:
        """`budget` in bytes; `most_tokens` are the most that a forward ever has."""
        self.counts = Counts()
        self.budget = budget
        size = sum(map(math.prod, saved_shapes(config, most_tokens).values()))  # elements of one layer
        self._host = pinned((config.num_layers, size), f"float{8 * itemsize}")
        self._copies = CopyStream()
        self._here: dict[int, Saved] = {}  # the lowest layer first
        self._away: dict[int, dict[str, tuple[int, ...]]] = {}  # shapes of what lies on the host

    def save(self, layer: int, saved: Saved) -> None:
        while self._here and self.counts.held + nbytes(saved) > self.budget:
            lowest = next(iter(self._here))
            self.counts.hold(-nbytes(self._here[lowest]))
            self._leave(lowest, self._here.pop(lowest))
        if nbytes(saved) <= self.budget:
            self._here[layer] = saved
            self.counts.hold(nbytes(saved))
        else:
            self._leave(layer, saved)

    def load(self, layer: int) -> Saved:
        """Gives the layer away, and sends for the highest of those that are on the host, if there is room."""
        if layer in self._here:
            saved = self._here.pop(layer)
            self.counts.hold(-nbytes(saved))
        else:
            saved = self._come(layer)
        self._copies.wait()
        if self._away and self.counts.held + self._size(lower := max(self._away)) <= self.budget:
            self._here = {lower: self._come(lower), **self._here}
            self.counts.hold(nbytes(self._here[lower]))
        return saved

    def release(self, layer: int) -> None:
        """Nothing is left to give back: `load` did."""

    def _leave(self, layer: int, saved: Saved) -> None:
        offset = 0
        self._copies.begin()
        for array in saved.values():
            self._copies.out(array.reshape(-1), self._host[layer, offset : offset + array.size])
            offset += array.size
        self._copies.wait()  # before the memory is used for something else
        self._away[layer] = {name: array.shape for name, array in saved.items()}
        self.counts.moved_out += nbytes(saved)

    def _come(self, layer: int) -> Saved:
        shapes = self._away.pop(layer)
        saved = {name: xp.empty(shape, dtype=self._host.dtype) for name, shape in shapes.items()}
        offset = 0
        self._copies.begin()
        for array in saved.values():
            self._copies.back(self._host[layer, offset : offset + array.size], array.reshape(-1))
            offset += array.size
        self.counts.moved_in += nbytes(saved)
        return saved

    def _size(self, layer: int) -> int:
        return self._host.itemsize * sum(map(math.prod, self._away[layer].values()))


@dataclass
class _Stored:
    """A layer in pages: its tensors lie one after another, with no regard to where a page ends."""

    shapes: dict[str, tuple[int, ...]]
    pages: list[int] = field(default_factory=list)


class Paged:
    """What is saved lies in pages of one size: the budget's number of them on the device, the others on the host."""

    recompute = False

    def __init__(self, budget: int, page_size: int, config: ModelConfig, most_tokens: int, itemsize: int = 4) -> None:
        """`budget` and `page_size` in bytes; `most_tokens` are the most that a forward ever has.

        Raises ValueError for a budget smaller than a page, or a page that is not whole elements.
        """
        if page_size < itemsize or page_size % itemsize:
            raise ValueError(f"the page size is {page_size} bytes; a multiple of {itemsize} is needed")
        if budget < page_size:
            raise ValueError(f"the budget is {budget} bytes; at least one page of {page_size} bytes is needed")
        self.counts = Counts()
        self._page = page_size // itemsize  # elements
        layer_size = sum(map(math.prod, saved_shapes(config, most_tokens).values()))  # elements
        most_pages = config.num_layers * -(-layer_size // self._page)
        dtype = f"float{8 * itemsize}"
        self._device = xp.empty((min(budget // page_size, most_pages), self._page), dtype=dtype)  # the pool
        self._host = pinned((most_pages + 1, self._page), dtype)  # one to spare, for two that change places
        self._layer_of: dict[int, int] = {}  # of each page
        policy = ByPriority(self._layer_of.__getitem__)
        self.residency = Residency(self._device.shape[0], self._host.shape[0], policy)
        self._stored: dict[int, _Stored] = {}
        self._copies = CopyStream()

    @property
    def pool_size(self) -> int:
        """Bytes of the pool on the device."""
        return int(self._device.nbytes)

    def save(self, layer: int, saved: Saved) -> None:
        stored = self._stored[layer] = _Stored({name: array.shape for name, array in saved.items()})
        for name, elements, pages, place in self._pieces(stored.shapes):
            if pages.start < len(stored.pages):  # the page that the tensor before has begun
                self._move(self.residency.need(stored.pages[pages]))
            else:
                stored.pages += self._add(layer, pages.stop - pages.start)
            self._copies.wait()
            into = saved[name].reshape(-1)[elements]
            self._device[self._blocks(stored.pages[pages]), place] = into.reshape(pages.stop - pages.start, -1)
            self.residency.written(stored.pages[pages])

    def load(self, layer: int) -> Saved:
        """Copies the layer out of its pages, which are free then, and sends for those of the layer below."""
        stored = self._stored.pop(layer)
        saved = {name: xp.empty(shape, dtype=self._device.dtype) for name, shape in stored.shapes.items()}
        freed = 0
        for name, elements, pages, place in self._pieces(stored.shapes):
            self._move(self.residency.need(stored.pages[pages]))
            self._copies.wait()
            out = saved[name].reshape(-1)[elements]
            out[:] = self._device[self._blocks(stored.pages[pages]), place].reshape(-1)
            if place.stop == self._page:  # the last that lies in them
                self._free(stored.pages[pages])
                freed = pages.stop
        self._free(stored.pages[freed:])
        if layer - 1 in self._stored:
            self._move(self.residency.prefetch(self._stored[layer - 1].pages))
        return saved

    def release(self, layer: int) -> None:
        """Nothing is left to give back: `load` did."""

    def _pieces(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, slice, slice, slice]]:
        """The tensors in pieces: name, its elements, the layer's pages, and the place in each of these pages.

        A piece is a part of one page, or whole pages, as many as the pool has at the most.
        """
        place, page = 0, 0
        for name, shape in shapes.items():
            first, size = 0, math.prod(shape)
            while first < size:
                if place or size - first < self._page:
                    count, length = 1, min(self._page - place, size - first)
                else:
                    count, length = min((size - first) // self._page, self._device.shape[0]), self._page
                elements = slice(first, first + count * length)
                yield name, elements, slice(page, page + count), slice(place, place + length)
                first += count * length
                page += count if place + length == self._page else 0
                place = (place + length) % self._page

    def _add(self, layer: int, count: int) -> list[int]:
        pages, transfers = self.residency.add(count)
        self._layer_of.update(dict.fromkeys(pages, layer))
        self._move(transfers)
        return pages

    def _free(self, pages: Sequence[int]) -> None:
        self.residency.free(pages)
        self._count()

    def _blocks(self, pages: Sequence[int]) -> Array:
        return xp.asarray([self.residency.device_of[page] for page in pages])  # [len(pages)]

    def _move(self, transfers: Sequence[Transfer]) -> None:
        """Make these copies, neighbours together."""
        self._copies.begin()
        for its in _joined(transfers):
            device, host = (its.source, its.destination) if its.kind == "swap_out" else (its.destination, its.source)
            here, there = self._device[device : device + its.count], self._host[host : host + its.count]
            if its.kind == "swap_out":
                self._copies.out(here, there)
                self.counts.moved_out += here.nbytes
            else:
                self._copies.back(there, here)
                self.counts.moved_in += here.nbytes
        self._count()

    def _count(self) -> None:
        used = self._device.shape[0] - self.residency.device.num_free
        self.counts.hold(used * self._page * self._device.itemsize - self.counts.held)


def _joined(transfers: Sequence[Transfer]) -> list[Transfer]:
    """The same copies, with neighbours on both sides in one."""
    joined: list[Transfer] = []
    for its in transfers:
        if joined:
            last = joined[-1]
            follows = (last.kind, last.source + last.count, last.destination + last.count)
            if follows == (its.kind, its.source, its.destination):
                joined[-1] = Transfer(its.kind, last.source, last.destination, last.count + its.count)
                continue
        joined.append(its)
    return joined


def nbytes(saved: Saved) -> int:
    return sum(array.nbytes for array in saved.values())
