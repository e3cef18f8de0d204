"""Chat templates: what they see, what they may not do, and LLM.chat; against transformers' apply_chat_template."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from paged_ref import LLM, SamplingParams
from paged_ref.core.model.loading import TINY
from paged_ref.interop import chat_template
from paged_ref.interop.chat_template import read_conversations, render
from paged_ref.interop.hf_tokenizer import HFTokenizer, chat_prompts, read_tokenizer

CHATML = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' -}}
{% endif %}
"""
SYSTEM = """{{ bos_token }}{% set ns = namespace(n=0) %}{%- for m in messages %}
  {%- if loop.index0 == 0 and m.role == 'system' %}{{ '<<' ~ m.content ~ '>>' }}{% continue %}{% endif %}
  {%- if m.role not in ['user', 'assistant'] %}{{ raise_exception('Unknown role: ' + m.role) }}{% endif %}
  {%- set ns.n = ns.n + 1 %}{% generation %}{{ ns.n }}:{{ m.content }}{{ eos_token }}{% endgeneration %}
{%- endfor %}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ answer_in | default('') }}"""
TEMPLATES = [
    CHATML,
    SYSTEM,
    "{{ messages | tojson }}",
    "{{ strftime_now('%Y') | length }}{% for m in messages %}\n  \n{% endfor %}x",
]
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "Once <upon> a time é"},
    {"role": "assistant", "content": "there was"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
GROWS = "{{% set ns = namespace(x='a') %}}{{% for _ in range(99) %}}{{% set ns.x = {} %}}{{% endfor %}}"
FOR, END = "{% for i in range(99) %}", "{% endfor %}"


def write_chat(directory: Path, template: Any = CHATML, **more: Any) -> Path:
    """The embedded model with two more special tokens in the place of two others, and a template."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(TINY / name, directory / name)
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    renamed = {2046: "<|im_start|>", 2047: "<|im_end|>"}
    vocab = {token: i for token, i in data["model"]["vocab"].items() if i not in renamed}
    lost = set(data["model"]["vocab"]) - set(vocab)
    data["model"]["merges"] = [merge for merge in data["model"]["merges"] if "".join(merge) not in lost]
    data["model"]["vocab"] = vocab | {text: i for i, text in renamed.items()}
    for i, text in renamed.items():
        data["added_tokens"].append({**data["added_tokens"][0], "id": i, "content": text})
    path.write_text(json.dumps(data), encoding="utf-8")
    config = {
        "eos_token": "<|im_end|>",
        "bos_token": {"__type": "AddedToken", "content": "<|im_start|>"},
        "chat_template": template,
        **more,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


# --- what a template gives -------------------------------------------------------------------------------


def test_a_conversation_in_its_form() -> None:
    text = render(CHATML, TALK[:2], TOKENS)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOnce <upon> a time é<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(CHATML, TALK, TOKENS, add_generation_prompt=False).endswith("there was<|im_end|>\n")
    text = render(CHATML, TALK, TOKENS, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nthere was")
    assert render(SYSTEM, TALK, TOKENS) == "<s><<Be brief. >>1:Once <upon> a time é</s>2:there was</s>"
    assert render(SYSTEM, TALK[1:2], TOKENS, variables={"answer_in": "French"}).endswith("</s>French")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (SYSTEM, "the chat template cannot be used for these messages: Unknown role: judge"),
        ("{{ messages[0]['content'].__class__.__mro__ }}", "for these messages: access to attribute '__class__' of"),
        ("{{ messages.append(1) }}", "for these messages: access to attribute 'append' of 'list' object is unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "for these messages: Range too big"),
        ("{% if %}", "for these messages: Expected an expression"),
        ("{{ messages[0].content + None }}", "for these messages: can only concatenate str"),
        ("{{ nothing.at.all }}", "for these messages: 'nothing' is undefined"),
        (f"{FOR}{FOR}{END}{END}", "for these messages: its loops make more than 256 turns"),
        (f"{{% macro m() %}}{FOR}{{{{ m() }}}}{END}{{% endmacro %}}{{{{ m() }}}}", "make more than 256 turns"),
        (
            "{{ 'a' * 10**10 }}",
            "for these messages: it makes a text, list or number of size 10,000,000,000; at most 16,777,216 is made",
        ),
        ("{{ 10**10 * ['a', 'b'] }}", "size 20,000,000,000; at most 16,777,216"),
        ("{{ 10**(10**10) }}", "size 40,000,000,000; at most 16,777,216"),
        (GROWS.format("ns.x + ns.x"), "size 33,554,432; at most 16,777,216"),
        (GROWS.format("ns.x ~ ns.x"), "size 33,554,432; at most 16,777,216"),
        (
            f"{{% set x = 'a' * 10**6 %}}{FOR}{{{{ x }}}}{END}",
            "size 17,000,000; at most 16,777,216",
        ),
    ],
)
def test_what_a_template_may_not_do(template: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MOST_TURNS", 256)
    with pytest.raises(ValueError, match=message):
        render(template, [{"role": "judge", "content": "x"}], TOKENS)


def test_operators_are_those_of_python() -> None:
    template = "{{ 'ab' * 2 ~ 3 * 4 ~ 2 ** 5 ~ ([1] + [2]) ~ ('a' + 'b') ~ 2 ** -1 ~ (1.5 + 1) ~ none }}"
    assert render(template, TALK, TOKENS) == "abab1232[1, 2]ab0.52.5None"


def test_turns_are_counted_for_each_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MOST_TURNS", 100)
    for _ in range(3):
        assert render(f"{FOR}x{END}", TALK, TOKENS) == 99 * "x"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"chat_template_kwargs": 3}, "chat_template_kwargs is 3; a dict of the template's own variables is needed"),
        ({"chat_template_kwargs": {"messages": 3}}, "chat_template_kwargs is {'messages': 3}; a dict of the"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs is {'tools': []}; a dict of the"),
        ({"chat_template_kwargs": {1: 3}}, "chat_template_kwargs is {1: 3}; a dict of the"),
        ({"tools": 3}, "tools is 3; functions, or JSON schemas of them, are needed"),
        ({"add_generation_prompt": "no"}, "add_generation_prompt is 'no'; True or False is needed"),
        ({"tokenize": True}, "tokenize is True; encode(text, add_special_tokens=False) makes token ids of the text"),
        ({"continue_final_message": 1}, "continue_final_message is 1; True or False is needed"),
    ],
)
def test_options_of_chat_are_refused_by_name(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        chat_prompts(
            read_tokenizer(TINY / "tokenizer.json"),
            TALK,
            "{{ messages[0].content }}",
            how.pop("chat_template_kwargs", None),
            **how,
        )


def test_a_message_that_the_template_changes_cannot_be_continued() -> None:
    with pytest.raises(ValueError, match="the chat template does not show the last message whole"):
        render("{{ messages[0].content[:3] }}", TALK[1:2], TOKENS, add_generation_prompt=False,
               continue_final_message=True)  # fmt: skip
    with pytest.raises(ValueError, match="add_generation_prompt and continue_final_message are both True"):
        render(CHATML, TALK, TOKENS, continue_final_message=True)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages is 'hello'; messages, or lists of them, are needed"),
        (TALK[1], "messages is .*; messages, or lists of them, are needed"),
        ([], "messages is empty; a conversation has at least one message"),
        ([TALK, []], "messages is empty; a conversation"),
        (["hello"], "a conversation is 'hello'; messages are needed"),
        ([{"content": "x"}], "a message is .*; a dict with role and content is needed"),
        ([{"role": "user", "content": 5}], "the content of a message is 5; a text is needed"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has the part .*; known are parts of type text"),
        ([{"role": "user", "content": "\udcff"}], r"a message holds '\\udcff' at place 0, which is no character"),
    ],
)
def test_what_is_no_conversation(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_conversations(messages)


def test_conversations_in_the_forms_that_people_have() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts, "name": None}, {"role": "assistant", "tool_calls": [{"id": 1}]}]
    wanted = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "tool_calls": [{"id": 1}]}]
    assert read_conversations(messages) == [wanted]
    assert read_conversations((tuple(messages), messages)) == [wanted, wanted]


# --- from a directory ------------------------------------------------------------------------------------


def test_chat_answers_with_the_checkpoints_template(tmp_path: Path) -> None:
    llm = LLM(write_chat(tmp_path))
    assert isinstance(llm.get_tokenizer(), HFTokenizer)
    params = SamplingParams(max_tokens=5)
    (output,) = llm.chat(TALK[:2], params)
    assert output.prompt == render(CHATML, TALK[:2], TOKENS)
    assert output.prompt_token_ids.count(2046) == 3
    wanted = llm.get_tokenizer().inner.encode(output.prompt, add_special_tokens=False).ids
    assert output.prompt_token_ids == wanted
    (plain,) = llm.generate([wanted], params)
    assert plain.outputs[0].token_ids == output.outputs[0].token_ids
    assert [o.prompt for o in llm.chat([TALK[:2], TALK[1:2]], params, chat_template="{{ messages | length }}")] == [
        "2",
        "1",
    ]
    assert llm.chat(TALK[:2], params, chat_template="{{ x }}", chat_template_kwargs={"x": "Once"})[0].prompt == "Once"
    (output,) = llm.chat(TALK, params, add_generation_prompt=False, continue_final_message=True)
    assert (output.prompt or "").endswith("assistant\nthere was")


def test_an_eos_named_only_in_tokenizer_config_stops(tmp_path: Path) -> None:
    llm = LLM(write_chat(tmp_path))
    assert llm.config.eos_token_ids == (0, 2047)
    (output,) = llm.generate("Once", SamplingParams(logit_bias={2047: 100.0}))
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([2047], "stop")


def test_the_template_of_a_file_goes_first_and_named_ones_are_chosen(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "d"},
        {"name": "tool_use", "template": "t"},
        {"name": "z", "template": "z"},
    ]
    tokenizer = read_tokenizer(write_chat(tmp_path, named) / "tokenizer.json")
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.apply_chat_template(TALK) == "d"
    assert tokenizer.apply_chat_template(TALK, tools=TOOLS) == "t"
    assert tokenizer.apply_chat_template(TALK, "z") == "z"
    assert tokenizer.apply_chat_template(TALK, "{{ bos_token }}") == "<|im_start|>"
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert read_tokenizer(tmp_path / "tokenizer.json").apply_chat_template(TALK) == "file"  # type: ignore[attr-defined]


@pytest.mark.parametrize("template", [5, [1], [{"name": "x"}], {"a": 1}])
def test_a_template_that_is_no_text_is_refused(tmp_path: Path, template: Any) -> None:
    with pytest.raises(ValueError, match=r"chat_template is .*; a text, or named texts, are needed"):
        LLM(write_chat(tmp_path, template))


def test_a_checkpoint_without_a_template_says_so() -> None:
    with pytest.raises(ValueError, match="tiny has no chat template; give a template, or a text in place of messages"):
        LLM("tiny").chat(TALK)


def test_text_that_begins_with_bos_gets_one(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(write_chat(tmp_path) / "tokenizer.json"))
    for single, added in (("<|im_start|> $A", [2046]), ("$A <|im_end|>", [])):
        inner.post_processor = processors.TemplateProcessing(
            single=single, pair=None, special_tokens=[("<|im_start|>", 2046), ("<|im_end|>", 2047)]
        )
        inner.save(str(tmp_path / "tokenizer.json"))
        tokenizer = read_tokenizer(tmp_path / "tokenizer.json")
        plain = tokenizer.encode("Once")
        assert plain[: len(added)] == added
        once = tokenizer.encode("<|im_start|>Once")
        assert once.count(2046) == 1
        assert once[once.index(2046) :] == [2046, *plain[len(added) :]]
        assert tokenizer.encode("<|im_start|><|im_start|>Once").count(2046) == 2  # as the text says


# --- transformers ----------------------------------------------------------------------------------------


@pytest.mark.compare
@pytest.mark.parametrize("template", TEMPLATES)
def test_against_transformers(template: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `compare` is not installed")
    directory = write_chat(tmp_path, template, tokenizer_class="PreTrainedTokenizerFast")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = read_tokenizer(directory / "tokenizer.json")
    assert isinstance(ours, HFTokenizer)
    options: dict[str, Any]
    without: dict[str, Any] = {"add_generation_prompt": False}
    for talk in (TALK, TALK[:2], TALK[1:2], [{"role": "user", "content": " spaces around  "}]):
        for options in (
            {}, {"add_generation_prompt": True}, {"tools": TOOLS}, {"answer_in": "French"},
            {"add_generation_prompt": False, "continue_final_message": True},
        ):  # fmt: skip
            if "continue_final_message" in options and template not in (CHATML, SYSTEM):
                continue  # transformers refuses it
            wanted = theirs.apply_chat_template(talk, tokenize=False, **options)
            mine = ours.apply_chat_template(talk, **(without | options))
            assert mine == wanted
            ids = theirs.apply_chat_template(talk, tokenize=True, return_dict=False, **options)
            assert ours.encode(mine, add_special_tokens=False) == ids
