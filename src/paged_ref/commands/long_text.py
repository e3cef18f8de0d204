"""A long text for `paged-ref long`: from a file, or written by the model itself."""

from __future__ import annotations

from pathlib import Path

from ..core.engine.sampling import SamplingParams
from ..llm import LLM

PIECE = 240  # tokens of each piece that the model writes: well within what it was trained for
BEGINNING = "Once upon a time"


def text_of(model: str, file: Path | None, num_tokens: int, seed: int = 0) -> list[int]:
    """The first `num_tokens` token ids of the file; without a file, of pieces that the model writes one by one,
    each within its context (temperature 0.8), so that every checkpoint has a long text at hand that it understands.

    Raises ValueError if the file cannot be read or is too short.
    """
    if file is not None:
        llm = LLM(model, kv_cache_tokens=16)
        try:
            ids = llm.tokenizer.encode(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"--text {file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"--text {file} is no text: byte {error.start} is not UTF-8") from None
        if len(ids) < num_tokens:
            raise ValueError(f"--text {file} has {len(ids)} tokens; --tokens asks for {num_tokens}")
        return ids[:num_tokens]
    count = -(-num_tokens // PIECE)
    llm = LLM(model, kv_cache_tokens=min(count, 64) * (PIECE + 32))
    beginning = llm.tokenizer.encode(BEGINNING)
    params = [SamplingParams(max_tokens=PIECE, temperature=0.8, seed=seed + i, ignore_eos=True) for i in range(count)]
    outputs = llm.generate([beginning] * count, params)
    return [token for output in outputs for token in output.outputs[0].token_ids][:num_tokens]
