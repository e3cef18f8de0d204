"""Chat templates: from messages to the text that a checkpoint was trained on, by the Jinja template that came with it.

A template is a program by others, so it runs in Jinja's sandbox, with what transformers gives it and nothing else
(`apply_chat_template` there). Jinja is imported when the first template is rendered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from datetime import datetime
from functools import cache, partial, reduce
from typing import Any

from ..extras.arguments import items, require_characters, require_flag, shown

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
_END_OF_MESSAGE = "END-OF-FINAL-MESSAGE "  # marks where a message that is to be continued ends
MOST_TURNS = 1 << 20  # of all loops and macros together, while a template is rendered
MOST_SIZE = 1 << 24  # of the text, and of each result in a template: more characters than any context holds


def read_conversations(given: Any) -> list[list[dict[str, Any]]]:
    """One conversation, or several, as lists of plain dictionaries. Raises ValueError for all else."""
    outer = items("messages", given, "messages, or lists of them,")
    several = bool(outer) and not isinstance(outer[0], Mapping)
    return [_read_messages(each) for each in (outer if several else [outer])]


def _read_messages(given: Any) -> list[dict[str, Any]]:
    messages = [_read_message(message) for message in items("a conversation", given, "messages")]
    if not messages:
        raise ValueError("messages is empty; a conversation has at least one message")
    return messages


def _read_message(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
        raise ValueError(f"a message is {shown(given)}; a dict with role and content is needed")
    message = {key: value for key, value in given.items() if value is not None}
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        message["content"] = content = "\n".join(map(_text_of_part, content))
    if content is not None and not isinstance(content, str):
        raise ValueError(f"the content of a message is {shown(content)}; a text is needed")
    require_characters("a message", content or "")
    plain: dict[str, Any] = json.loads(json.dumps(message, default=repr))  # a template gets no objects with methods
    return plain


def _text_of_part(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ValueError(f"the content of a message has the part {shown(part)}; known are parts of type text")


def render(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation.

    `special_tokens` are the variables bos_token, eos_token and so on; `variables` more of them. With
    `continue_final_message` the text ends inside the last message. Raises ValueError with what the template says.
    """
    require_flag("add_generation_prompt", add_generation_prompt)
    require_flag("continue_final_message", continue_final_message)
    if tools is not None:
        tools = items("tools", tools, "functions, or JSON schemas of them,")
    if continue_final_message:
        if add_generation_prompt:
            raise ValueError("add_generation_prompt and continue_final_message are both True; give one of them")
        last = {**messages[-1], "content": messages[-1].get("content", "") + _END_OF_MESSAGE}
        messages = [*messages[:-1], last]
    known = {**special_tokens, **(variables or {})}
    try:
        text = _compiled(template)(
            messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **known
        )
    except Exception as error:  # whatever the program by others does
        why = str(error) or type(error).__name__
        raise ValueError(f"the chat template cannot be used for these messages: {why}") from None
    if not continue_final_message:
        return text
    before, mark, after = text.rpartition(_END_OF_MESSAGE.strip())
    if not mark:
        raise ValueError("continue_final_message is True; the chat template does not show the last message whole")
    # A template that takes away the space behind the mark takes away the spaces at the end of a message.
    return before if after.startswith(" ") else before.rstrip()


def _size(operator: str, left: Any, right: Any) -> int:
    """How large the result is: the characters of a text, the items of a list or the bits of a number."""
    if operator == "+":
        return len(left) + len(right) if isinstance(left, Sized) and isinstance(right, Sized) else 0
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
    several, times = (left, right) if isinstance(left, Sized) else (right, left)
    return len(several) * times if isinstance(several, Sized) and isinstance(times, int) else 0


@cache
def _compiled(template: str) -> Callable[..., str]:
    """The template's function from variables to text. Every turn of a loop, and every call of a macro, counts, and no
    operator makes a large result."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the model says, for training; here it is the text inside."""

        tags = {"generation"}  # noqa: RUF012  (Jinja reads a set)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:  # Jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    turns = 0

    def count_turn() -> None:
        nonlocal turns
        turns += 1
        if turns > MOST_TURNS:
            raise jinja2.TemplateError(f"its loops make more than {MOST_TURNS} turns")

    def require_small(size: int) -> None:
        if size > MOST_SIZE:
            raise jinja2.TemplateError(
                f"it makes a text, list or number of size {size:,}; at most {MOST_SIZE:,} is made"
            )

    def checked(operator: str, left: Any, right: Any) -> Any:
        require_small(_size(operator, left, right))
        return environment.default_binop_table[operator](left, right)

    environment.intercepted_binops = frozenset(("+", "*", "**"))
    environment.binop_table |= {operator: partial(checked, operator) for operator in environment.intercepted_binops}
    environment.globals["join_texts"] = lambda *parts: reduce(partial(checked, "+"), map(str, parts))
    environment.globals["count_turn"] = count_turn
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    tree = environment.parse(template)
    loops: Any = (nodes.For, nodes.Macro)
    for node in list(tree.find_all(loops)):
        called = nodes.Call(nodes.Name("count_turn", "load"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(called, lineno=node.lineno))
    for joined in list(tree.find_all(nodes.Concat)):
        joined.nodes = [nodes.Call(nodes.Name("join_texts", "load"), joined.nodes, [], None, None)]
    compiled = environment.from_string(tree)

    def run(**variables: Any) -> str:
        nonlocal turns
        turns, size, pieces = 0, 0, []
        for piece in compiled.generate(**variables):
            size += len(piece)
            require_small(size)
            pieces.append(piece)
        return "".join(pieces)

    return run


def choose(templates: Mapping[str, str], wanted: str | None, tools: Iterable[Any] | None, where: object) -> str:
    """The template to use: `wanted`, a name among `templates` or a template itself, or the checkpoint's default."""
    if wanted is not None:
        return templates.get(wanted, wanted)
    name = "tool_use" if tools and "tool_use" in templates else "default"
    if name not in templates:
        raise ValueError(f"{where} has no chat template; give a template, or a text in place of messages")
    return templates[name]
