"""Text to token ids and back: tokenizer.json through the `tokenizers` library, and the chat template.

Neither library is imported before it is needed. Text of a hostile tokenizer.json is bounded in size and can not escape
its types; what is not bounded is the time that its regular expressions take on a text.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .chat_template import TemplateRefused, render
from .errors import CheckpointError, DTypeError, IndexRangeError, InvalidArgumentError
from .folder import ModelFolder, foreign, show

__all__ = ["TextStream", "Tokenizer"]

# Qwen2's has 7 MB, or 11 when it is indented.
MAX_TOKENIZER_BYTES = 32 << 20
MAX_CONFIG_BYTES = 4 << 20
MAX_TEMPLATE_BYTES = 1 << 20
# Characters that the steps of a normalizer, or of a decoder, may make of one. Qwen2's make one or two.
MAX_GROWTH = 1024

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer that gives the ids of transformers' AutoTokenizer."""

    def __init__(self, folder: ModelFolder, backend: Any, settings: Mapping[str, Any], template: Any) -> None:
        """For `open`: the backend of the tokenizers library, tokenizer_config.json, and a chat template or a list."""
        self.folder = folder
        self._backend = backend
        self._file = folder.path / "tokenizer_config.json"
        #: "eos_token": "<|endoftext|>" and the like, as far as tokenizer_config.json names them.
        self.special_tokens: dict[str, str] = {}
        self._templates = self._read_templates(template)
        self._add_tokens(settings)
        backend.no_truncation()
        backend.no_padding()

    @classmethod
    def open(cls, path: str | os.PathLike[str] | ModelFolder) -> Tokenizer:
        """The tokenizer of a folder, or of the embedded model for the string "tiny".

        Reads tokenizer.json and, if they are there, tokenizer_config.json and chat_template.jinja, which wins over a
        template in tokenizer_config.json. Raises `CheckpointError`.
        """
        import tokenizers

        folder = path if isinstance(path, ModelFolder) else ModelFolder.locate(path)
        name = "tokenizer.json"
        raw = folder.read_bytes(name, MAX_TOKENIZER_BYTES)
        with foreign(folder.path / name, "content", "a tokenizer of the tokenizers library"):
            backend = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        for field in ("normalizer", "decoder"):
            _check_growth(folder.path / name, field, getattr(backend, field))
        dropout = getattr(backend.model, "dropout", None)
        if dropout:
            raise CheckpointError(
                file=folder.path / name, field="model.dropout", expected="null, as it makes ids random", found=dropout
            )
        settings: dict[str, Any] = {}
        if folder.has("tokenizer_config.json"):
            settings = folder.read_json("tokenizer_config.json", MAX_CONFIG_BYTES)
        template = settings.get("chat_template")
        if folder.has("chat_template.jinja"):
            with foreign(folder.path / "chat_template.jinja", "encoding", "UTF-8"):
                template = folder.read_bytes("chat_template.jinja", MAX_TEMPLATE_BYTES).decode("utf-8")
        return cls(folder, backend, settings, template)

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.folder.path)!r}, vocab_size={self.vocab_size})"

    @property
    def vocab_size(self) -> int:
        """One more than the highest id; the model may have more rows, or fewer, which it checks where it matters."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def bos_token_id(self) -> int | None:
        """The id of bos_token, None if there is none."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of eos_token, None if there is none. Texts end at `Qwen2Config.eos_token_ids`."""
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id of pad_token, None if there is none."""
        return self._named_id("pad_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return "default" in self._templates

    def token_to_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary, None if there is none."""
        result: int | None = self._backend.token_to_id(token)
        return result

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. Special tokens written in it become their ids; `add_special_tokens` adds what the
        post-processor of tokenizer.json adds (Qwen2's: nothing). As in transformers, add_bos_token and add_eos_token of
        tokenizer_config.json do not count beside a tokenizer.json.

        Raises InvalidArgumentError for what is no text in UTF-8, and `CheckpointError` if the tokenizer fails on it.
        """
        try:
            text.encode("utf-8")
        except (AttributeError, UnicodeEncodeError) as error:
            raise InvalidArgumentError(f"text: expected text that UTF-8 can hold, found {show(text)}") from error
        with foreign(self.folder.path / "tokenizer.json", "encode", "ids"):
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary become nothing.

        Raises IndexRangeError for what can be no id, DTypeError for what is no number.
        """
        try:
            checked = [operator.index(token) for token in ids]
        except TypeError:
            raise DTypeError(f"ids: expected integers, found {show(ids)}") from None
        for token in checked:
            if not 0 <= token < 1 << 32:
                raise IndexRangeError(f"ids: expected tokens from 0 to {(1 << 32) - 1}, found {show(token)}")
        with foreign(self.folder.path / "tokenizer.json", "decode", "text"):
            return str(self._backend.decode(checked, skip_special_tokens=skip_special_tokens))

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A `TextStream` over this tokenizer."""
        return TextStream(self, skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for `messages` ({"role": "user", "content": "..."}), to be encoded with add_special_tokens=False.

        `tools` and `variables` are handed to the template, as are the special tokens by name. The template runs in a
        process of its own, within `chat_template.LIMITS`. Raises InvalidArgumentError for messages that are not plain
        data or that the template refuses, `CheckpointError` for a template that is missing, faulty or too greedy.
        """
        field = "chat_template"
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise CheckpointError(file=self._file, field=field, expected="a template", found="none")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InvalidArgumentError(f"messages[{index}]: expected an object with a role, found {show(message)}")
        names: dict[str, Any] = {**self.special_tokens, **variables}
        names |= {
            "messages": [dict(message) for message in messages],
            "tools": [dict(tool) for tool in tools] if tools is not None else None,
            "documents": variables.get("documents"),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        try:
            return render(self._templates[name], names)
        except TemplateRefused as error:
            if error.by_template:
                raise InvalidArgumentError(
                    f"messages: expected what the chat template takes, found: {show(str(error), 300)}"
                ) from None
            for index, message in enumerate(messages):
                if "content" not in message:  # most templates take it for a text
                    raise InvalidArgumentError(
                        f"messages[{index}]: expected an object with a role and content, found {show(message)}, "
                        f"with which the chat template fails: {show(str(error), 300)}"
                    ) from None
            raise CheckpointError(
                file=self._file, field=field, expected="a template that renders", found=show(str(error), 500)
            ) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"messages: expected plain JSON data, found: {show(str(error))}") from None

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)

    def _read_templates(self, template: Any) -> dict[str, str]:
        """One template is "default"; a list holds objects with name and template."""
        if template is None:
            return {}
        items = template if isinstance(template, list) else [{"name": "default", "template": template}]
        result: dict[str, str] = {}
        for item in items:
            name, text = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
            if not isinstance(name, str) or not isinstance(text, str) or len(text) > MAX_TEMPLATE_BYTES:
                expected = f"a text of at most {MAX_TEMPLATE_BYTES} characters, or a list of named ones"
                raise CheckpointError(file=self._file, field="chat_template", expected=expected, found=show(item))
            result[name] = text
        return result

    def _add_tokens(self, settings: Mapping[str, Any]) -> None:
        """Declares the special tokens of tokenizer_config.json that tokenizer.json does not declare.

        transformers gives new ids to tokens that are in neither; such ids the model knows nothing of, so they are
        refused here unless added_tokens_decoder says the very id.
        """
        listed = settings.get("added_tokens_decoder") or {}
        if not isinstance(listed, dict):
            raise self._bad("added_tokens_decoder", "an object", listed)
        decoder: dict[int, Any] = {}
        for key, value in listed.items():
            if not key.isascii() or not key.isdigit() or len(key) > 10:
                raise self._bad("added_tokens_decoder", "ids as keys", key)
            decoder[int(key)] = value
        for token_id, value in sorted(decoder.items()):
            field = f"added_tokens_decoder.{token_id}"
            content = self._declare(field, value, new=True, default_special=False)
            if self.token_to_id(content) != token_id:
                raise self._bad(
                    field, f"the token with this id, {show(content)} has {self.token_to_id(content)}", value
                )
        for name in _NAMED:
            if settings.get(name) is not None:
                self.special_tokens[name] = self._declare(name, settings[name])
        for name in ("additional_special_tokens", "extra_special_tokens"):
            extra = settings.get(name) or []
            if not isinstance(extra, (list, dict)):
                raise self._bad(name, "a list", extra)
            for value in extra.values() if isinstance(extra, dict) else extra:
                self._declare(name, value)

    def _declare(self, field: str, value: Any, *, new: bool = False, default_special: bool = True) -> str:
        """Makes `value`, a text or the object form of an added token, an added token of the backend; its text."""
        from tokenizers import AddedToken

        options = value if isinstance(value, dict) else {"content": value}
        content = options.get("content")
        flags = {
            key: options.get(key, key == "normalized" and not default_special)
            for key in ("lstrip", "rstrip", "single_word", "normalized")
        }
        special = options.get("special", default_special) or default_special
        if (
            not isinstance(content, str)
            or not content
            or any(type(flag) is not bool for flag in (*flags.values(), special))
        ):
            raise self._bad(field, "a token", value)
        if not new and self.token_to_id(content) is None:
            raise self._bad(field, "a token of the vocabulary", value)
        known = {token.content: token.special for token in self._backend.get_added_tokens_decoder().values()}
        if content not in known or (special and not known[content]):
            with foreign(self._file, field, "a token"):
                add = self._backend.add_special_tokens if special else self._backend.add_tokens
                add([AddedToken(content, special=special, **flags)])
        return content

    def _bad(self, field: str, expected: str, found: Any) -> CheckpointError:
        return CheckpointError(file=Path(self._file), field=field, expected=expected, found=show(found))


def _check_growth(file: Path, field: str, part: Any) -> None:
    """Refuse a chain of replacements that makes a text of any length out of one character: the tokenizers library
    aborts the process when it gets no memory."""
    found = 1 if part is None else _growth(json.loads(part.__getstate__()))
    if found > MAX_GROWTH:
        raise CheckpointError(
            file=file, field=field, expected=f"steps that make at most {MAX_GROWTH} characters of one", found=found
        )


def _growth(part: Any) -> int:
    """How many characters one may become in a serialised normalizer or decoder and all its steps."""
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1
    own = {"Replace": "content", "Prepend": "prepend"}.get(str(part.get("type")))
    added = len(str(part[own])) if own is not None and own in part else 0
    return (1 + added) * math.prod(map(_growth, part.values()))


class TextStream:
    """Text of tokens as they come. `put` returns what is certain by now: never half a UTF-8 character.

    The texts returned by all `put` and by `end` together are what `decode` makes of all the tokens.
    """

    # A character has 4 bytes, so 3 may be there of one that is not complete; each may show as one U+FFFD.
    _HELD = 3

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        """For `Tokenizer.stream`."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._printed = 0

    def put(self, token: int) -> str:
        """The text that `token` completes, "" if none."""
        self._window.append(int(token))
        text = self._decode()
        held = len(text) - len(text.rstrip("\ufffd"))
        ready = text[self._printed : len(text) - min(held, self._HELD)]
        self._printed += len(ready)
        if ready and not held:
            # The last token stays as context: some decoders treat the first token of a text in their own way.
            self._window = self._window[-1:]
            self._printed = len(self._decode())
        return ready

    def end(self) -> str:
        """What is left, incomplete characters as U+FFFD; the stream is then as new."""
        rest = self._decode()[self._printed :]
        self._window, self._printed = [], 0
        return rest

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip)
