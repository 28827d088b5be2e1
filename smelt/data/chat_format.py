"""ChatFormat: how one model takes a conversation, and what its answers mean; knows no weights.

A model that comes with a Jinja chat template gets its prompts from that; a request never brings one. Others get
plain paragraphs (`chat`), and know no tools.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from smelt.data import chat
from smelt.data.control_tokens import ControlTokens, Marks
from smelt.data.hf_tokenizer import read_backend
from smelt.data.template_process import Renderer, TemplateProcess
from smelt.data.tokenizers import Tokenizer
from smelt.data.tool_calls import Dialect, ToolCallStream, dialect_of
from smelt.errors import InvalidInput, UnsupportedModel
from smelt.types import ChatMessage, ToolCall

TEMPLATE_FILE = "chat_template.jinja"
TOOL_TEMPLATE_FILE = "additional_chat_templates/tool_use.jinja"
SETTINGS_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
# What ends a turn, where the model's settings name only the end of a text.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")

PROCESS = TemplateProcess()  # one for all models; it starts with the first that has a template

Tools = Sequence[Mapping[str, Any]]  # definitions in OpenAI's form


@dataclass(frozen=True)
class ChatTemplate:
    """What a model's folder says about conversations: its template, the one for tools, and special tokens by role."""

    text: str
    tool_text: str
    special_tokens: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path) -> "ChatTemplate | None":
        """The template in a folder; None where there is none. UnsupportedModel where the files are damaged."""
        settings = _read_json(folder / SETTINGS_FILE)
        texts = _named_templates(settings.get("chat_template"))
        for name, file in (("default", TEMPLATE_FILE), ("tool_use", TOOL_TEMPLATE_FILE)):
            if (folder / file).is_file():
                texts[name] = (folder / file).read_text(encoding="utf-8")
        if not texts:
            return None
        text = texts.get("default") or next(iter(texts.values()))
        return ChatTemplate(text, texts.get("tool_use", text), _special_tokens(folder, settings))

    @property
    def understands_tools(self) -> bool:
        """Whether it makes anything of tool definitions."""
        return re.search(r"\btools\b", self.tool_text) is not None


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as text, up to any turn, and its tokens.

    `text_of` gives the first so many turns and, if asked, the beginning of the assistant's next one. `encode` gives
    the ids of such a text, and where in it each of them ends. `last_ids` end a conversation, where no template does.
    """

    text_of: Callable[[int, bool], str]
    encode: Callable[[str], tuple[list[int], list[int]]]
    last_ids: tuple[int, ...] = ()


class ChatFormat:
    """How a model takes conversations. `ChatFormat.of(folder, tokenizer)` makes one; threads may share it."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, template: ChatTemplate | None, renderer: Renderer = PROCESS
    ) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._template = template
        self._renderer = renderer

    @staticmethod
    def of(folder: Path | None, tokenizer: Tokenizer) -> "ChatFormat":
        """The format of the model in a folder (None, or a file: a model that came without one)."""
        if folder is None or not folder.is_dir():
            return ChatFormat(Path(), tokenizer, None)
        template = ChatTemplate.read(folder)
        if template is not None:
            PROCESS.start()
        return ChatFormat(folder, tokenizer, template)

    @property
    def has_template(self) -> bool:
        """Whether the model brought its own."""
        return self._template is not None

    @property
    def understands_tools(self) -> bool:
        """Whether functions may be offered to the model."""
        return self._template is not None and self._template.understands_tools

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """What in an answer's text shows that the turn is over."""
        return () if self._template else chat.stop_strings()

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end a turn, by the model's settings and its template."""
        named = _read_json(self._folder / GENERATION_FILE).get("eos_token_id")
        ids = {token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)}
        if self._template is not None:
            names = [name for name in TURN_ENDS if name in self._template.text]
            names.append(self._template.special_tokens.get("eos_token", ""))
            ids |= self._control.special_ids(names).keys()
        return frozenset(ids)

    @cached_property
    def call_marks(self) -> dict[int, bytes]:
        """Special tokens that are text where functions may be called, since they tell calls from words."""
        if self._dialect is None:
            return {}
        names = self._control.special_ids((*self._dialect.markers, *self._dialect.marks_within))
        return {token: name.encode() for token, name in names.items()}

    def prompt_ids(self, messages: Sequence[ChatMessage], tools: Tools = ()) -> list[int]:
        """Tokens of the conversation so far and of the beginning of the assistant's next turn.

        InvalidInput where the template refuses the conversation, or there are tools that it does not know.
        """
        if self._template is None:
            _refuse_tools(messages, tools)
            return [*self._first_ids, *self._tokenizer.encode(chat.render_prompt(messages))]
        rendering = self.rendering(messages, tools)
        return rendering.encode(rendering.text_of(len(messages), True))[0]

    def rendering(self, messages: Sequence[ChatMessage], tools: Tools = ()) -> Rendering:
        """The conversation as text whose turns can be told apart; raises as `prompt_ids` does."""
        if not self.understands_tools:
            _refuse_tools(messages, tools)
        template = self._template
        if template is None:
            return self._plain_rendering(messages)
        with _not_too_deep():
            marks = self._control.marks_for([_to_dict(message) for message in messages], list(tools))

        def text_of(num_turns: int, begins_reply: bool) -> str:
            with _not_too_deep():
                return marks.unescape(self._render(template, messages[:num_turns], tools, marks, begins_reply))

        return Rendering(text_of, lambda text: self._control.encode_with_ends(text, marks))

    def save(self, folder: Path) -> None:
        """Write what says so of the model, beside a tokenizer that was saved there; its own files stay."""
        for name in (TEMPLATE_FILE, TOOL_TEMPLATE_FILE, SETTINGS_FILE, GENERATION_FILE):
            if (self._folder / name).is_file() and not (folder / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes((self._folder / name).read_bytes())

    def parse(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """What the assistant says in a whole answer, and the functions that it wants called."""
        return self._dialect.read(text) if self._dialect else (text, ())

    def tool_calls(self) -> ToolCallStream:
        """To tell an answer's text from its calls while it is written; only where tools were given."""
        return ToolCallStream(self._dialect)

    def _render(
        self,
        template: ChatTemplate,
        messages: Sequence[ChatMessage],
        tools: Tools,
        marks: Marks,
        begins_reply: bool,
    ) -> str:
        variables = {
            **template.special_tokens,
            "messages": [_marked(message, marks) for message in messages],
            "tools": marks.mark(list(tools)) or None,
            "documents": None,
            "add_generation_prompt": begins_reply,
        }
        return self._renderer.render(template.tool_text if tools else template.text, variables)

    def _plain_rendering(self, messages: Sequence[ChatMessage]) -> Rendering:
        def encode(text: str) -> tuple[list[int], list[int]]:
            ids, ends = _encode_plain(self._tokenizer, text)
            return [*self._first_ids, *ids], [*(0 for _ in self._first_ids), *ends]

        eot_id = self._tokenizer.eot_id
        return Rendering(partial(_plain_text, messages), encode, () if eot_id is None else (eot_id,))

    @property
    def _first_ids(self) -> tuple[int, ...]:
        """What goes before a text, where no template writes it."""
        return () if self._tokenizer.bos_id is None else (self._tokenizer.bos_id,)

    @cached_property
    def _dialect(self) -> Dialect | None:
        return dialect_of(self._template.tool_text) if self._template and self.understands_tools else None

    @cached_property
    def _control(self) -> ControlTokens:
        assert self._template is not None
        return ControlTokens(read_backend(self._folder), self._template.text + self._template.tool_text)


@contextmanager
def _not_too_deep() -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise InvalidInput("the tools, or the arguments of a call, are nested too deeply") from None


def _plain_text(messages: Sequence[ChatMessage], num_turns: int, begins_reply: bool) -> str:
    return (chat.render_prompt if begins_reply else chat.render_messages)(messages[:num_turns])


def _encode_plain(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Ids of a text, and where each ends, by the bytes that tokens stand for.

    Some tokenizers put a space before a text. UnsupportedModel for those whose tokens do not stand for bytes.
    """
    ids = tokenizer.encode(text)
    parts = [tokenizer.decode_bytes([token]) for token in ids]
    if b"".join(parts).removeprefix(b" ") != text.encode().removeprefix(b" "):
        raise UnsupportedModel(f"the tokenizer {tokenizer.name} does not say which part of a text a token stands for")
    char_ends = np.cumsum([0, *(len(char.encode()) for char in text)])
    token_ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    token_ends -= sum(map(len, parts)) - int(char_ends[-1])
    return ids, np.searchsorted(char_ends, token_ends).tolist()


def _refuse_tools(messages: Sequence[ChatMessage], tools: Tools) -> None:
    """Neither are definitions left out in silence, nor what was called."""
    if tools:
        raise InvalidInput("this model's chat template knows no tools; leave out `tools`", "tools")
    if any(message.tool_calls or message.role == "tool" for message in messages):
        reason = "this model's chat template knows no tools; leave out tool calls and turns of the role `tool`"
        raise InvalidInput(reason, "messages")


def _to_dict(message: ChatMessage) -> dict[str, Any]:
    """A turn as templates know it: OpenAI's, but for arguments, which are objects."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [_call_to_dict(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _call_to_dict(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = call.arguments
    function = {"name": call.name, "arguments": arguments if isinstance(arguments, dict) else call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _marked(message: ChatMessage, marks: Marks) -> dict[str, Any]:
    turn = marks.mark(_to_dict(message))
    if message.role == "assistant":
        turn["content"] = marks.mark_but_tags(message.content)
    return {**turn, "role": message.role}


def _named_templates(value: Any) -> dict[str, str]:
    """`chat_template` of the settings: one text, or a list of named ones."""
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) else []
    return {
        entry["name"]: entry["template"]
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    }


def _special_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and their like, by the names that templates know."""
    named = {**_read_json(folder / "special_tokens_map.json"), **settings}
    contents = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in named.items()
        if name.endswith("_token")
    }
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from None
    return value if isinstance(value, dict) else {}
