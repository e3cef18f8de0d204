"""What LLM takes as prompts: text, token ids of any library, and vLLM's dictionaries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..core.engine.llm import Prompt
from .arguments import items, require_characters, whole_number

Given = Prompt | Mapping[str, Any]


def read_prompt(given: Any) -> Prompt:
    """Text as it is, or token ids as a list of int.

    `given` is text, whole numbers (a list, an array, a tensor, an iterator), {"prompt": text} or
    {"prompt_token_ids": ids}, of which the ids count where both are there. Raises ValueError for all else.
    """
    if isinstance(given, Mapping):
        if not given or not given.keys() <= {"prompt", "prompt_token_ids"}:
            raise ValueError(f"the prompt has the keys {list(given)}; known are prompt, prompt_token_ids")
        given = given.get("prompt_token_ids", given.get("prompt"))
    if not isinstance(given, str):
        return [whole_number("a token id of the prompt", i) for i in items("the prompt", given, "text or token ids")]
    require_characters("the prompt", given)
    return given


def read_prompts(given: Any) -> list[Any]:
    """One prompt or several, as a list that `read_prompt` reads one by one."""
    if isinstance(given, (str, Mapping)):
        return [given]
    prompts = list(items("prompts", given, "text, token ids, or a list of them"))
    first = prompts[0] if prompts else ""
    # a number has no elements: in an array or a tensor, it has no axis
    is_list = isinstance(first, Iterable) and getattr(first, "ndim", 1) > 0
    return prompts if is_list else [prompts]
