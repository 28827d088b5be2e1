"""Templates against transformers' own rendering, and what becomes of hostile ones."""

from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from chat_templates import TEMPLATES, TOOL
from smelt.data.templates import MAX_CHARS, render
from smelt.errors import InvalidInput, UnsupportedModel

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "user", "content": "  Hi <b>there</b>\n"},
    {"role": "assistant", "content": "<think>\nwell\n</think>\n\nHello 🐈 "},
    {"role": "user", "content": "Weather?"},
]
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Köln <x> \"y\" & 'z'"}},
}
CALLED = [
    TALK[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"celsius": 3}', "tool_call_id": "call00001", "name": "get_weather"},
]
SYSTEM: list[dict[str, Any]] = [{"role": "system", "content": "Be brief. "}]
CASES = [
    *((name, TALK, None) for name in TEMPLATES),
    *((name, SYSTEM + TALK, None) for name in TEMPLATES if name != "mistral"),
    *((name, CALLED + [TALK[2]], [TOOL, TOOL]) for name in ("llama_3", "qwen_3", "mistral")),
    ("qwen_3", SYSTEM + CALLED, [TOOL]),
    ("llama_3", SYSTEM + CALLED, None),
]


@pytest.mark.parametrize(("name", "messages", "tools"), CASES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_rendering_is_as_that_of_transformers(
    name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool
) -> None:
    variables = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt, **TOKENS}
    theirs, _ = render_jinja_template(
        [messages], tools, None, TEMPLATES[name], add_generation_prompt=add_generation_prompt, **TOKENS
    )
    assert render(TEMPLATES[name], variables) == theirs[0]


@pytest.mark.parametrize(
    "filters",
    ["tojson", "tojson(indent=2)", "tojson(separators=(',', ':'), sort_keys=true)", "tojson(ensure_ascii=true)"],
)
def test_json_is_written_as_transformers_writes_it(filters: str) -> None:
    template = f"{{{{ messages | {filters} }}}}"
    assert render(template, {"messages": CALLED}) == render_jinja_template([CALLED], chat_template=template)[0][0]


def test_a_template_can_tell_the_date() -> None:
    assert render("{{ strftime_now('%Y-%m') }}", {}) == datetime.now().astimezone().strftime("%Y-%m")


def test_what_a_template_says_about_a_conversation_is_told() -> None:
    with pytest.raises(InvalidInput, match="refuses the conversation: Turns must alternate") as refused:
        render(TEMPLATES["llama_2"], {"messages": [TALK[0], TALK[2]], **TOKENS})
    assert refused.value.param == "messages"
    assert not isinstance(refused.value, UnsupportedModel)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for x in", "not valid: line 1"),
        ("{{ messages[0].nothing.more }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError: no loader"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{% macro more() %}{{ more() }}{% endmacro %}{{ more() }}", "calls itself without end"),
        ("{% for x in range(10**5) %}{{ 'x' * 1000 }}{% endfor %}", f"more than {MAX_CHARS:,} characters"),
    ],
)
def test_a_bad_template_is_refused_with_its_reason(template: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        render(template, {"messages": TALK})
