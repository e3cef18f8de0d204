"""A long text for `paged-ref long`: from a file, or written by the model itself."""

from __future__ import annotations

from pathlib import Path

from ..core.checks import plural
from ..extras.reading import read_text
from ..extras.sampling_params import SamplingParams
from ..interop.checkpoints import load
from ..llm import LLM

PIECE = 240  # tokens of each piece that the model writes: well within the context that it was trained for
BEGINNING = "Once upon a time"


def text_of(model: str, file: Path | None, num_tokens: int, seed: int = 0) -> list[int]:
    """`num_tokens` token ids: the first of the file, or without a file what the model writes.

    The model writes in pieces (temperature 0.8), each within its context, so that every checkpoint has a long text
    that it understands. Raises ValueError if the file cannot be read or is too short.
    """
    return _written(model, num_tokens, seed) if file is None else _read(model, file, num_tokens)


def _read(model: str, file: Path, num_tokens: int) -> list[int]:
    try:
        text = read_text(file)
    except ValueError as error:
        raise ValueError(f"--text {error}") from None
    ids = load(model).tokenizer.encode(text)
    if len(ids) < num_tokens:
        raise ValueError(f"--text {file} has {plural(len(ids), 'token')}; --tokens asks for {num_tokens}")
    return ids[:num_tokens]


def _written(model: str, num_tokens: int, seed: int) -> list[int]:
    count = -(-num_tokens // PIECE)
    llm = LLM(model, kv_cache_tokens=min(count, 64) * (PIECE + 32))
    beginning = llm.tokenizer.encode(BEGINNING)
    params = [SamplingParams(max_tokens=PIECE, temperature=0.8, seed=seed + i, ignore_eos=True) for i in range(count)]
    outputs = llm.generate([beginning] * count, params)
    return [token for output in outputs for token in output.outputs[0].token_ids][:num_tokens]
