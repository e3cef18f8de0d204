"""One token as it is shown on screen, in one line."""

from __future__ import annotations

from ..core.model.tokenizer import Tokenizer

_SHOWN_AS = {" ": "·", "\n": "↵", "\t": "→"}


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of a token id: a space is `·`, a line break `↵`, a tab `→`."""
    piece = tokenizer.inner.id_to_token(token_id)
    if piece is None:
        return f"<{token_id}>"
    if "▁" in piece:  # SentencePiece's space; its decoder would drop the first one
        text = piece.replace("▁", " ")
    else:
        text = tokenizer.inner.decode([token_id], skip_special_tokens=False) or piece
    return visible(text)


def visible(text: str) -> str:
    """The text in one line, with signs for spaces and what cannot be printed."""
    return "".join(_SHOWN_AS.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)
