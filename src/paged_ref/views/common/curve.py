"""A curve of numbers as text: one dot of a Braille pattern for each of its points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # [row][column] of a Braille pattern's 4 x 2
LABEL = 7  # columns of the number at the left


def curve(values: Sequence[float], width: int, height: int, unit: str = "") -> list[str]:
    """`height` lines of `width` columns: the highest value above, the lowest below, first to last across.

    Where there are more values than dots across, a dot is the mean of its share.
    """
    if not values:
        return []
    across = max(1, 2 * (width - LABEL - 2))  # dots
    shares = np.array_split(np.asarray(values, dtype=float), min(across, len(values)))
    means = np.array([share.mean() for share in shares])  # [dots across]
    lowest, highest = float(means.min()), float(means.max())
    rows = 4 * (height - 1)  # dots from top to bottom; the last line is the axis
    places = np.rint((highest - means) / ((highest - lowest) or 1) * (rows - 1)).astype(int)
    cells = np.zeros((height - 1, across // 2), dtype=int)
    for at in range(across):
        row = places[at * len(means) // across]
        cells[row // 4, min(at // 2, cells.shape[1] - 1)] |= DOTS[row % 4][at % 2]
    labels = [""] * (height - 1)
    labels[-1], labels[0] = f"{lowest:.3f}", f"{highest:.3f}"
    lines = [
        f"{label:>{LABEL}} ┤" + "".join(chr(0x2800 + int(cell)) for cell in row)
        for label, row in zip(labels, cells, strict=True)
    ]
    return [*lines, f"{unit:>{LABEL}} └" + "─" * (across // 2)]
