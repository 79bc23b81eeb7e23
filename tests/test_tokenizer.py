"""Tokenizer: the ids and prompts of transformers, text in whole characters, and templates that can not run away."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llaisys.chat_template import TemplateRefused, render
from llaisys.errors import CheckpointError, DTypeError, IndexRangeError, InvalidArgumentError, LlaisysError
from llaisys.folder import ModelFolder
from llaisys.tokenizer import Tokenizer

from .checkpoints import write_json

TEXTS = [
    "",
    " ",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Grüße, 世界! 😀 👩‍👩‍👧 e\u0301 \u00e9 1234567890",
    "a\tb\r\n\r\n  c   ",
    "<|im_start|>user\nhi<|im_end|><|endoftext|>",
    "\x00\x01\ufffd\U0010ffff",
    "don't WON'T 'll",
]


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.open("tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(ModelFolder.locate("tiny").root, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "model"


#: A post-processor that puts <|im_start|> first.
POST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "bos", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"bos": {"id": "bos", "ids": [4094], "tokens": ["<|im_start|>"]}},
}


def edit(folder: Path, name: str = "tokenizer_config.json", drop: tuple[str, ...] = (), **changes: Any) -> Path:
    values = json.loads((folder / name).read_text())
    write_json(folder / name, {key: value for key, value in {**values, **changes}.items() if key not in drop})
    return folder


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# ----------------------------------------------------------------------------------------------------- ids and text


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_bos_token": True, "add_eos_token": True, "bos_token": "<|im_start|>"},
        {"post_processor": POST, "add_bos_token": False},
        {"eos_token": {"content": "<|im_end|>", "__type": "AddedToken", "special": True}, "pad_token": None},
    ],
)
def test_ids_of_transformers(folder: Path, changes: dict[str, Any]) -> None:
    if "post_processor" in changes:
        edit(folder, "tokenizer.json", post_processor=changes.pop("post_processor"))
    edit(folder, **changes)
    ours, other = Tokenizer.open(folder), theirs(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == other.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == other.decode(ids, skip_special_tokens=skip)
    assert (ours.encode("x")[0] == 4094) is (changes == {"add_bos_token": False})
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (
        other.bos_token_id,
        other.eos_token_id,
        other.pad_token_id,
    )


def test_tokens_that_only_the_config_declares(folder: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    token = {"content": "<|new|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    decoder = {str(item["id"]): {key: item[key] for key in item if key != "id"} for item in added}
    edit(folder, added_tokens_decoder={**decoder, "4096": {**token, "single_word": False}})
    ours, other = Tokenizer.open(folder), theirs(folder)
    assert ours.encode("a<|new|>b") == other.encode("a<|new|>b") and 4096 in ours.encode("a<|new|>b")
    assert ours.decode([4096], skip_special_tokens=True) == ""
    assert ours.vocab_size == 4097
    edit(folder, added_tokens_decoder={**decoder, "5000": token})
    with pytest.raises(CheckpointError, match=r"added_tokens_decoder\.5000"):
        Tokenizer.open(folder)


def test_only_tokenizer_json(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.encode(TEXTS[2]) == Tokenizer.open("tiny").encode(TEXTS[2])
    assert tokenizer.special_tokens == {} and not tokenizer.has_chat_template


def test_truncation_and_padding_are_off(folder: Path) -> None:
    edit(
        folder,
        "tokenizer.json",
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "!"},
    )  # fmt: skip
    assert Tokenizer.open(folder).encode(TEXTS[2]) == Tokenizer.open("tiny").encode(TEXTS[2])


def test_what_is_no_text_or_no_id(tiny: Tokenizer) -> None:
    for text in ("\ud800", None, b"x", 3):
        with pytest.raises(InvalidArgumentError):
            tiny.encode(text)  # type: ignore[arg-type]
    for token in (-1, 1 << 32, 10**30):
        with pytest.raises(IndexRangeError):
            tiny.decode([token])
    for ids in ("ab", [1.5], [None], 3):
        with pytest.raises(DTypeError, match="ids: expected integers, found"):
            tiny.decode(ids)  # type: ignore[arg-type]
    assert tiny.decode([10**9]) == ""
    assert repr(tiny) == f"Tokenizer({str(tiny.folder.path)!r}, vocab_size=4096)"
    assert tiny.vocab_size == 4096 and tiny.token_to_id("<|im_end|>") == 4095 and tiny.token_to_id("not one") is None


# ----------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("text", TEXTS)
def test_stream_of_texts(tiny: Tokenizer, text: str) -> None:
    stream = tiny.stream(skip_special_tokens=False)
    parts = [stream.put(token) for token in tiny.encode(text)]
    for part in parts:
        assert "\ufffd" not in part or "\ufffd" in text
    assert "".join(parts) + stream.end() == tiny.decode(tiny.encode(text))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, 4100) | st.integers(0, 300) | st.integers(4090, 4095), max_size=30), st.booleans())
def test_stream_of_any_tokens(ids: list[int], skip: bool) -> None:
    tokenizer = Tokenizer.open("tiny") if not CACHE else CACHE[0]
    CACHE.append(tokenizer)
    stream = tokenizer.stream(skip_special_tokens=skip)
    for _ in range(2):  # end makes it new
        text = "".join(stream.put(token) for token in ids) + stream.end()
        assert text == tokenizer.decode(ids, skip_special_tokens=skip)


CACHE: list[Tokenizer] = []


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_stream_never_prints_half_a_character(text: str) -> None:
    tokenizer = Tokenizer.open("tiny") if not CACHE else CACHE[0]
    CACHE.append(tokenizer)
    stream = tokenizer.stream(skip_special_tokens=False)
    ids = tokenizer.encode(text)
    parts = [stream.put(token) for token in ids]
    parts.append(stream.end())
    assert sum(part.count("\ufffd") for part in parts) == tokenizer.decode(ids).count("\ufffd") == text.count("\ufffd")


def test_stream_is_not_late(tiny: Tokenizer) -> None:
    stream = tiny.stream()
    for token in tiny.encode("plain ASCII comes at once"):
        assert stream.put(token)


# -------------------------------------------------------------------------------------------------------- chat template

CHAT = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "Grüße 😀\n"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, None]}}}]},
]
QWEN_LIKE = """{%- if messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(n=0) %}
{%- for message in messages %}
    {%- if loop.first %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {{- '<|im_start|>' ~ message.role ~ ns.n ~ '\\n' ~ (message.content | trim) }}
    {%- for call in message.tool_calls or [] %}
<tool_call>{{ call | tojson }}{{ call | tojson(indent=2) }}</tool_call>
    {%- endfor %}
    {% generation %}x{% endgeneration %}
{%- endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}
{{ eos_token }}{{ bos_token is defined }}{{ undefined_thing }}{{ flag }}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, [{"name": "é", "x": [1, 2.5, True]}]])
def test_prompt_of_transformers(folder: Path, prompt: bool, tools: Any) -> None:
    (folder / "chat_template.jinja").write_text(QWEN_LIKE)  # which wins over the one in tokenizer_config.json
    ours = Tokenizer.open(folder).apply_chat_template(CHAT, prompt, tools=tools, flag="on")
    other = theirs(folder).apply_chat_template(
        CHAT, add_generation_prompt=prompt, tools=tools, flag="on", tokenize=False
    )
    assert ours == other and "<tool_call>" in ours


def test_prompt_of_the_embedded_model(tiny: Tokenizer) -> None:
    text = tiny.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert 4094 in tiny.encode(text, add_special_tokens=False)


def test_named_templates(folder: Path) -> None:
    edit(folder, chat_template=[{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}])
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.apply_chat_template([]) == "d"
    assert tokenizer.apply_chat_template([], tools=[{"name": "f"}]) == "t"


def test_refusals(folder: Path, tiny: Tokenizer) -> None:
    with pytest.raises(InvalidArgumentError, match=r"messages\[0\]: expected an object with a role and content, found"):
        tiny.apply_chat_template([{"role": "user"}])
    edit(folder, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidArgumentError, match="roles must alternate"):
        Tokenizer.open(folder).apply_chat_template([])
    edit(folder, chat_template="{% if %}")
    with pytest.raises(CheckpointError, match="TemplateSyntaxError") as caught:
        Tokenizer.open(folder).apply_chat_template([])
    assert caught.value.field == "chat_template"
    edit(folder, drop=("chat_template",))
    with pytest.raises(CheckpointError, match="expected a template, found none"):
        Tokenizer.open(folder).apply_chat_template([])
    for messages in ([3], [{}], [{"role": 1}], [{"role": "user", "content": object()}], [{"role": "u", "c": {1, 2}}]):
        with pytest.raises(InvalidArgumentError, match="messages"):
            tiny.apply_chat_template(messages)  # type: ignore[arg-type]


LIMITS = {"cpu": 1, "wall": 10, "memory": 256 << 20, "output": 100_000}


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ range(10**9) }}",
        "{{ 'x' * 10**11 }}",
        "{{ 'x' * 200000 }}",
        "{{ (7 ** 77777777) % 10 }}",
        "{% for i in range(99999) %}{{ i }}{% endfor %}",
        "{% set ns = namespace(x='xy') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xy') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}",
        "{{ 'x'.center(10**11) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '{:99999999999}'.format(1) }}",
        "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
        "{{ lipsum(n=10**7) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 5000,
        "{{ [].__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
    ],
)
def test_template_that_runs_away(template: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateRefused) as caught:
        text = render(template, {"messages": [{"role": "user"}]}, LIMITS)
        # What is undefined may render as nothing, as long as nothing comes out.
        assert text.strip() == "", text
        raise TemplateRefused("it rendered nothing")
    assert not caught.value.by_template and time.monotonic() - start < 30
    assert len(str(caught.value)) < 600


def test_folder_modules_do_not_reach_the_renderer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jinja2.py", "markupsafe.py", "json.py", "sitecustomize.py"):
        (folder / name).write_text("raise SystemExit(9)\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    assert Tokenizer.open(folder).apply_chat_template([], False) == ""


# ------------------------------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "[" * 100_000,
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        '{"version": "1.0", "model": {"type": "Nothing"}}',
        '{"version": "1.0", "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "((("}, "behavior": "Isolated",'
        ' "invert": false}, "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    ],
)
def test_bad_tokenizer_json(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.open(folder)
    assert caught.value.file.endswith("tokenizer.json") and caught.value.field == "content"


def test_other_bad_files(folder: Path) -> None:
    good = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(b"\xff" + good)
    with pytest.raises(CheckpointError, match="utf-8"):
        Tokenizer.open(folder)
    (folder / "tokenizer.json").write_bytes(good + b" " * (32 << 20))
    with pytest.raises(CheckpointError, match="size"):
        Tokenizer.open(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        Tokenizer.open(folder)
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="character device"):
        Tokenizer.open(folder)


def test_replacements_that_grow_without_end_are_refused(folder: Path) -> None:
    """The tokenizers library would abort the process for want of memory."""
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    chain = {"type": "Sequence", "normalizers": [grow] * 4}
    with pytest.raises(CheckpointError, match="normalizer: expected steps that make at most 1024 characters of one"):
        Tokenizer.open(edit(folder, "tokenizer.json", normalizer=chain))
    decoders = {"type": "Sequence", "decoders": [grow] * 4}
    with pytest.raises(CheckpointError, match="decoder: expected steps"):
        Tokenizer.open(edit(folder, "tokenizer.json", normalizer=None, decoder=decoders))
    # As Llama's, which are harmless.
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    usual = {"type": "Sequence", "normalizers": [prepend, replace]}
    assert Tokenizer.open(edit(folder, "tokenizer.json", normalizer=usual, decoder=None)).encode("a b")


def test_dropout_is_refused(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    edit(folder, "tokenizer.json", model={**model, "dropout": 0.5})
    with pytest.raises(CheckpointError, match=r"model\.dropout"):
        Tokenizer.open(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token": "<not in the vocabulary>"},
        {"eos_token": 3},
        {"eos_token": ""},
        {"eos_token": {"content": None}},
        {"eos_token": {"content": "<|im_end|>", "lstrip": "yes"}},
        {"additional_special_tokens": ["<no>"]},
        {"additional_special_tokens": "<|im_end|>"},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"-1": {"content": "a"}}},
        {"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}},
        {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}},
        {"chat_template": 3},
        {"chat_template": [3]},
        {"chat_template": [{"name": "default"}]},
        {"chat_template": "x" * (2 << 20)},
    ],
)
def test_bad_tokenizer_config(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.open(folder)
    assert "tokenizer_config.json" in caught.value.file and caught.value.field.startswith(next(iter(changes)))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 5), st.binary(max_size=4))
def test_fuzz(tmp_path_factory: pytest.TempPathFactory, position: int, cut: int, noise: bytes) -> None:
    source = ModelFolder.locate("tiny").root
    folder = tmp_path_factory.getbasetemp() / "fuzz_tokenizer"
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        raw = (source / name).read_bytes()
        (folder / name).write_bytes(raw[:position] + noise + raw[position + cut :])
    try:
        tokenizer = Tokenizer.open(folder)
        tokenizer.decode(tokenizer.encode(TEXTS[3]))
    except LlaisysError as error:
        assert len(str(error)) < 1000
