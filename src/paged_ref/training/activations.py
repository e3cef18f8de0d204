"""Where the layers' saved activations lie until backward needs them: four ways, and what each costs.

`Keep` holds everything on the device. `Recompute` holds each layer's input, and runs the layer once more. `Swap` holds
what the budget allows, in whole layers, and moves the others to the host. `Paged` cuts the activations into pages of
one size that are evicted and loaded one by one, by the same Residency as the pages of a KV cache. Backward needs the
layers from the last to the first. So the lowest layer, which is needed last, is evicted first (Belady 1966), and pages
are loaded one layer ahead.

The budget is for saved activations only: each of the four also has the arrays of the layer that is being computed. All
give the same gradients to the bit, since moving bytes changes none.

Paging gains little in training. A KV cache grows to a length that is not known; a training step knows the size of every
tensor before it begins, and frees tensors in the opposite order of allocation, so no room is wasted. `paged-ref bench
training` measures what is left. Pages use a budget to its last page, which saves at most one layer out and in; but each
tensor is copied into its pages and out of them, since BLAS reads no block table. Recompute wins if a link moves bytes
more slowly than the device computes them again: the bytes of a layer grow with hidden_size, its work with its square.

Practice: checkpointing (Chen et al. 2016) is in every framework; vDNN (Rhu et al. 2016) moved whole layers; QLoRA
(Dettmers et al. 2023) pages the optimizer state, since it is not known when a long sequence makes a peak.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..beyond_device.residency import Residency
from ..beyond_device.storage import PageStorage
from ..core.device import Array, xp
from ..core.memory.manager import Transfer
from ..core.model.config import ModelConfig
from ..extras.memory_limit import require_memory
from ..tuned.copies import CopyStream, pinned
from .network import Saved, saved_shapes

MEMORY = ("keep", "swap", "page", "recompute")
PAGE_SIZE = 64 * 1024  # bytes


def activations_for(
    memory: str, config: ModelConfig, most_tokens: int, budget: int | None = None, page_size: int = PAGE_SIZE
) -> Keep | Swap | Paged:
    """The storage of the name `memory`, one of MEMORY. `budget` and `page_size` in bytes; a forward never has more than
    `most_tokens`.

    Raises ValueError for a budget that is missing, smaller than a page, or without a use.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory is {memory!r}; known are {', '.join(MEMORY)}")
    saved = 4 * sum(map(math.prod, saved_shapes(config, most_tokens).values()))  # bytes of one layer
    layers = 1 if memory == "recompute" else config.num_layers
    require_memory(f"micro_tokens is {most_tokens}: what the layers save for backward", layers * saved)
    if memory in ("keep", "recompute"):
        if budget is not None:
            raise ValueError(f"a budget is given to {memory}, which has no use for it; swap and page have")
        return Keep() if memory == "keep" else Recompute()
    if budget is None:
        raise ValueError(f"the budget is missing; {memory} needs one")
    if memory == "swap":
        return Swap(budget, config, most_tokens)
    return Paged(budget, page_size, config, most_tokens)


@dataclass
class Counts:
    """Bytes that were held and moved since the last `clear`."""

    held: int = 0  # on the device now
    peak: int = 0  # the most that was held at the same time
    moved_out: int = 0  # device to host
    moved_in: int = 0  # host to device

    def hold(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)

    def clear(self) -> None:
        self.peak, self.moved_out, self.moved_in = self.held, 0, 0


class Keep:
    """Everything stays on the device: the plain way to train."""

    recompute = False

    def __init__(self) -> None:
        self.counts = Counts()
        self._saved: dict[int, Saved] = {}

    def save(self, layer: int, saved: Saved) -> None:
        self._saved[layer] = saved
        self.counts.hold(nbytes(saved))

    def load(self, layer: int) -> Saved:
        saved = self._saved.pop(layer)
        self.counts.hold(-nbytes(saved))
        return saved


class Recompute(Keep):
    """Like Keep, but each layer saves its input alone (Chen et al. 2016, with every layer a checkpoint)."""

    recompute = True


class Swap:
    """When the budget is full, whole layers are evicted to the host and loaded again (vDNN: Rhu et al. 2016)."""

    recompute = False

    def __init__(self, budget: int, config: ModelConfig, most_tokens: int) -> None:
        """`budget` in bytes; a forward never has more than `most_tokens`."""
        self.counts = Counts()
        self.budget = budget
        size = sum(map(math.prod, saved_shapes(config, most_tokens).values()))  # elements of one layer
        self._host = pinned((config.num_layers, size), "float32")
        self._copies = CopyStream()
        self._here: dict[int, Saved] = {}  # on the device, the lowest layer first
        self._away: dict[int, dict[str, tuple[int, ...]]] = {}  # on the host: the shapes of each layer

    def save(self, layer: int, saved: Saved) -> None:
        while self._here and self.counts.held + nbytes(saved) > self.budget:
            lowest = next(iter(self._here))
            self.counts.hold(-nbytes(self._here[lowest]))
            self._evict(lowest, self._here.pop(lowest))
        if nbytes(saved) <= self.budget:
            self._here[layer] = saved
            self.counts.hold(nbytes(saved))
        else:
            self._evict(layer, saved)

    def load(self, layer: int) -> Saved:
        """Also start loading the highest layer that is on the host, if it fits the budget."""
        if layer in self._here:
            saved = self._here.pop(layer)
            self.counts.hold(-nbytes(saved))
        else:
            saved = self._load(layer)
        self._copies.wait()
        if self._away and self.counts.held + self._size(lower := max(self._away)) <= self.budget:
            self._here = {lower: self._load(lower), **self._here}
            self.counts.hold(nbytes(self._here[lower]))
        return saved

    def _evict(self, layer: int, saved: Saved) -> None:
        self._copies.begin()
        for array, host in self._on_host(layer, saved):
            self._copies.out(array.reshape(-1), host)
        self._copies.wait()  # before the device memory is used again
        self._away[layer] = {name: array.shape for name, array in saved.items()}
        self.counts.moved_out += nbytes(saved)

    def _load(self, layer: int) -> Saved:
        shapes = self._away.pop(layer)
        saved = {name: xp.empty(shape, dtype=self._host.dtype) for name, shape in shapes.items()}
        self._copies.begin()
        for array, host in self._on_host(layer, saved):
            self._copies.back(host, array.reshape(-1))
        self.counts.moved_in += nbytes(saved)
        return saved

    def _on_host(self, layer: int, saved: Saved) -> Iterator[tuple[Array, np.ndarray]]:
        """Each array, and its place in host memory [size]: one after another."""
        ends = np.cumsum([array.size for array in saved.values()]).tolist()
        for array, end in zip(saved.values(), ends, strict=True):
            yield array, self._host[layer, end - array.size : end]

    def _size(self, layer: int) -> int:
        return self._host.itemsize * sum(map(math.prod, self._away[layer].values()))


@dataclass
class _PagedLayer:
    """A layer in pages: its tensors lie one after another, across the borders of pages."""

    shapes: dict[str, tuple[int, ...]]
    pages: list[int] = field(default_factory=list)


class Paged:
    """Activations lie in pages of one size: as many on the device as the budget holds, the others on the host."""

    recompute = False

    def __init__(self, budget: int, page_size: int, config: ModelConfig, most_tokens: int) -> None:
        """`budget` and `page_size` in bytes; a forward never has more than `most_tokens`.

        Raises ValueError for a budget smaller than a page, or a page that is not whole elements.
        """
        if page_size < 4 or page_size % 4:
            raise ValueError(f"the page size is {page_size} bytes; a multiple of 4 is needed")
        if budget < page_size:
            raise ValueError(f"the budget is {budget} bytes; at least one page of {page_size} bytes is needed")
        self.counts = Counts()
        self._page = page_size // 4  # float32 elements
        layer_size = sum(map(math.prod, saved_shapes(config, most_tokens).values()))  # elements
        most_pages = config.num_layers * -(-layer_size // self._page)
        in_pool, on_host = min(budget // page_size, most_pages), most_pages + 1  # one spare, to exchange two pages
        require_memory(f"the page size is {page_size}: a pool of such pages", (in_pool + on_host) * page_size)
        self._storage = PageStorage(1, in_pool, on_host, (self._page,), "float32")
        self._pool = self._storage.device[0]  # [in_pool, self._page]
        self._layer_of: dict[int, int] = {}  # of each page
        self.residency = Residency(in_pool, on_host, self._layer_of.__getitem__)
        self._layers: dict[int, _PagedLayer] = {}

    @property
    def pool_size(self) -> int:
        """Bytes of the pool on the device."""
        return int(self._pool.nbytes)

    def save(self, layer: int, saved: Saved) -> None:
        paged = self._layers[layer] = _PagedLayer({name: array.shape for name, array in saved.items()})
        for name, elements, pages, place in self._pieces(paged.shapes):
            if pages.start < len(paged.pages):  # the previous tensor ends in this page
                self._move(self.residency.need(paged.pages[pages]))
            else:
                new, transfers = self.residency.add(pages.stop - pages.start)
                self._layer_of.update(dict.fromkeys(new, layer))
                self._move(transfers)
                paged.pages += new
            self._storage.wait()
            piece = saved[name].reshape(-1)[elements]
            self._pool[self._blocks(paged.pages[pages]), place] = piece.reshape(pages.stop - pages.start, -1)
            self.residency.written(paged.pages[pages])

    def load(self, layer: int) -> Saved:
        """Copy the layer out of its pages, free them, and start loading the next lower layer."""
        paged = self._layers.pop(layer)
        saved = {name: xp.empty(shape, dtype=self._pool.dtype) for name, shape in paged.shapes.items()}
        num_freed = 0
        for name, elements, pages, place in self._pieces(paged.shapes):
            self._move(self.residency.need(paged.pages[pages]))
            self._storage.wait()
            piece = saved[name].reshape(-1)[elements]
            piece[:] = self._pool[self._blocks(paged.pages[pages]), place].reshape(-1)
            if place.stop == self._page:  # no later tensor begins in these pages
                self._free(paged.pages[pages])
                num_freed = pages.stop
        self._free(paged.pages[num_freed:])
        if layer - 1 in self._layers:
            self._move(self.residency.prefetch(self._layers[layer - 1].pages))
        return saved

    def _pieces(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, slice, slice, slice]]:
        """The tensors in pieces: name, elements of the tensor, pages of the layer, place in each of these pages.

        A piece is a part of one page, or whole pages, at most as many as the pool has.
        """
        place, page = 0, 0
        for name, shape in shapes.items():
            first, size = 0, math.prod(shape)
            while first < size:
                if place or size - first < self._page:
                    count, length = 1, min(self._page - place, size - first)
                else:
                    count, length = min((size - first) // self._page, len(self._pool)), self._page
                elements = slice(first, first + count * length)
                yield name, elements, slice(page, page + count), slice(place, place + length)
                first += count * length
                page += count if place + length == self._page else 0
                place = (place + length) % self._page

    def _free(self, pages: Sequence[int]) -> None:
        self.residency.free(pages)
        self._count()

    def _blocks(self, pages: Sequence[int]) -> Array:
        return xp.asarray([self.residency.device_of[page] for page in pages])  # [len(pages)]

    def _move(self, transfers: Sequence[Transfer]) -> None:
        bytes_out, bytes_in = self._storage.apply(transfers)
        self.counts.moved_out += bytes_out
        self.counts.moved_in += bytes_in
        self._count()

    def _count(self) -> None:
        used = len(self._pool) - self.residency.device.num_free
        self.counts.hold(used * self._storage.page_bytes - self.counts.held)


def nbytes(saved: Saved) -> int:
    return sum(array.nbytes for array in saved.values())
