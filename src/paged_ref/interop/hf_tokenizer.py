"""tokenizer.json from elsewhere: tried when it is loaded, so that none of its faults ends the process later.

The tokenizers library is written in Rust. What it did not expect is a panic there, which reaches Python as an exception
that is no Exception, after a report on stderr; and memory that is not there ends the process.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from ..core.model.tokenizer import Tokenizer
from ..extras.arguments import shown
from ..extras.reading import JSON_LIMIT, read_json_object, read_text
from .chat_template import Message, choose, read_conversations, render

_TRIED = "Hello, 12 \N{LATIN SMALL LETTER E WITH ACUTE}\n\N{GRINNING FACE} a"


class HFTokenizer(Tokenizer):
    """A tokenizer of others, with its special tokens by their role and its chat templates by name. Each failure of the
    library is a ValueError."""

    def __init__(
        self, inner: tokenizers.Tokenizer, where: Path, special_tokens: dict[str, str], chat_templates: dict[str, str]
    ) -> None:
        """`where` is the checkpoint, for messages."""
        super().__init__(inner)
        self.where, self.special_tokens, self.chat_templates = where, special_tokens, chat_templates
        self._bos = ""  # the token that the tokenizer itself puts before every text
        with suppress(Exception):
            self._bos = inner.id_to_token(inner.encode("").ids[0]) or ""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`. Where the tokenizer adds BOS and the text begins with BOS, there is one."""
        try:
            ids: list[int] = self.inner.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:
            if not _is_failure(error):
                raise
            raise ValueError(f"the tokenizer cannot encode {text[:40]!r}: {error}") from None
        twice = add_special_tokens and self._bos and text.startswith(self._bos) and ids[:1] == ids[1:2]
        return ids[1:] if twice else ids

    def token_id(self, name: str) -> int | None:
        """The id of a special token, as "eos_token"; None where there is none."""
        text = self.special_tokens.get(name)
        return None if text is None else self.inner.token_to_id(text)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """The text of one conversation, by the checkpoint's template or by `chat_template`, which gets the `variables`.
        Raises ValueError."""
        if variables.pop("tokenize", False):  # as transformers does where it is not told otherwise
            raise ValueError("tokenize is True; encode(text, add_special_tokens=False) makes token ids of the text")
        (conversation,) = read_conversations([messages])
        template = choose(self.chat_templates, chat_template, tools, self.where)
        return render(
            template, conversation, self.special_tokens, add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message, tools=tools, variables=variables,
        )  # fmt: skip

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        try:
            return self.inner.decode(ids)
        except BaseException as error:
            if not _is_failure(error):
                raise
            raise ValueError(f"the tokenizer cannot decode {ids[:8]}: {error}") from None


def chat_prompts(
    tokenizer: Tokenizer, messages: Any, chat_template: str | None = None, variables: Any = None, **how: Any
) -> list[dict[str, Any]]:
    """A prompt with text and token ids for each conversation. `how` has options of apply_chat_template, `variables`
    those of the template alone. Raises ValueError."""
    if not isinstance(tokenizer, HFTokenizer):
        raise ValueError("chat needs the text of tokens, and the checkpoint has no tokenizer.json")
    variables = {} if variables is None else variables
    own = {*signature(tokenizer.apply_chat_template).parameters, "documents"}
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) and name not in own for name in variables):
        raise ValueError(
            f"chat_template_kwargs is {shown(variables)}; a dict of the template's own variables is needed"
        )
    prompts = []
    for conversation in read_conversations(messages):
        text = tokenizer.apply_chat_template(conversation, chat_template, **how, **variables)
        # The template writes the special tokens that are needed.
        prompts.append({"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)})
    return prompts


class MissingTokenizer(Tokenizer):
    """In the place of a tokenizer.json that is not there: token ids go in and come out, and have no text."""

    def __init__(self, directory: Path) -> None:
        super().__init__(tokenizers.Tokenizer(models.WordLevel({})))
        self.directory = directory

    def encode(self, text: str) -> list[int]:
        raise ValueError(f"{self.directory} has no tokenizer.json; token ids are needed in place of {text[:40]!r}")

    def decode(self, ids: Iterable[int]) -> str:
        return ""


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Truncation and padding that it asks for are ignored, as transformers does.

    Raises ValueError, in one sentence, where the file is missing, is no tokenizer, or makes the library panic.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing; a tokenizer.json of Hugging Face tokenizers is needed")
    text = read_text(path, JSON_LIMIT)
    try:
        with _without_reports():
            inner = tokenizers.Tokenizer.from_str(text)
            inner.no_padding()
            inner.no_truncation()
            _try_out(inner)
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    return HFTokenizer(inner, path.parent, *_read_more(path.parent))


def _read_more(directory: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Of tokenizer_config.json and chat_template.jinja: special tokens by their role, and chat templates by name."""
    config_path, template_path = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    config = read_json_object(config_path) if config_path.exists() else {}
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    found = config.get("chat_template")
    entries = found if isinstance(found, list) else [{"name": "default", "template": found}] if found else []
    templates = {}
    for entry in entries:
        named, template = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "template"))
        if not isinstance(named, str) or not isinstance(template, str):
            what = reprlib.repr(found)
            raise ValueError(f"{config_path}: chat_template is {what}; a text, or named texts, are needed")
        templates[named] = template
    if template_path.exists():
        templates["default"] = read_text(template_path, JSON_LIMIT)
    return tokens, templates


def _try_out(inner: tokenizers.Tokenizer) -> None:
    """Encode a text and decode some tokens. An Exception only says that this text has no tokens here; a panic says that
    the library does not know what this file asks for."""
    with suppress(Exception):  # the library raises Exception itself
        inner.encode(_TRIED)
    with suppress(Exception):
        inner.encode("")
    for token_id in range(256):
        with suppress(Exception):
            inner.decode([token_id])


def _is_failure(error: BaseException) -> bool:
    """Of the library. Its panics have a type that cannot be imported."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def _without_reports() -> Iterator[None]:
    """Rust writes a report of a panic to stderr before Python sees an exception; here the exception says it all."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
