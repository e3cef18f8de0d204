"""The sizes of the attention call that the walk goes through, and their bounds."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ACCESSES = 400_000  # the tracer needs a few seconds for so many
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # names of sequences


@dataclass(frozen=True, slots=True)
class Sizes:
    """The call to walk through: one query token for each sequence, as in a decode step."""

    tokens: tuple[int, ...] = (6, 3)  # keys of each sequence
    block_size: int = 4
    num_heads: int = 2
    num_kv_heads: int = 1
    head_size: int = 8
    num_threads: int = 8
    dtype: str = "float32"
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError with the option, its value and the bound."""
        for option, value, most in (
            ("--block-size", self.block_size, 64),
            ("--heads", self.num_heads, 64),
            ("--kv-heads", self.num_kv_heads, 64),
            ("--head-size", self.head_size, 256),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{option} is {value}; 1 to {most} is needed")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"--heads is {self.num_heads}; a multiple of --kv-heads {self.num_kv_heads} is needed")
        if not 1 <= self.num_threads <= 128 or self.num_threads & (self.num_threads - 1):
            raise ValueError(f"--threads is {self.num_threads}; a power of two from 1 to 128 is needed")
        if not 1 <= len(self.tokens) <= len(LETTERS):
            raise ValueError(f"--tokens names {len(self.tokens)} sequences; 1 to {len(LETTERS)} are needed")
        for count in self.tokens:
            if count < 1:
                raise ValueError(f"--tokens has {count}; at least 1 is needed, the query's own token")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; at least 0 is needed")
        # Each element of K costs two accesses (q and K), each of V three (weight, slot and V).
        expected = 5 * sum(self.tokens) * self.num_heads * self.head_size
        if expected > MAX_ACCESSES:
            raise ValueError(
                f"--tokens {' '.join(map(str, self.tokens))} with {self.num_heads} heads of {self.head_size} make "
                f"about {expected:,} accesses; at most {MAX_ACCESSES:,} can be walked"
            )
