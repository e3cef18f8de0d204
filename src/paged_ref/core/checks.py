"""How arguments are refused: with the name, the value and the bound. Nouns agree with their numbers."""

from __future__ import annotations


def require(**bounds: tuple[int | float, int]) -> None:
    """Raise ValueError for the first argument that is below its bound: `require(block_size=(block_size, 1))`."""
    for name, (value, least) in bounds.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}; at least {least} is needed")


def require_one_of(known: tuple[str, ...], **given: object) -> None:
    """Raise ValueError for the first argument whose value is none of `known`."""
    for name, value in given.items():
        if value not in known:
            raise ValueError(f"{name} is {value!r}; known are {', '.join(known)}")


def plural(number: int, thing: str) -> str:
    """`1 block`, `2 blocks`."""
    things = thing[:-1] + "ies" if thing.endswith("y") else thing + "s"
    return f"{number:,} {thing if number == 1 else things}"
