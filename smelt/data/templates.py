"""Chat templates rendered in Jinja's sandbox, as transformers renders them; knows no models and no processes.

The sandbox keeps a template from attributes that begin with an underscore and from changing what it is given. It
does not keep it from taking all time and memory: for that see `template_process`.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from smelt.errors import InvalidInput, SmeltError, UnsupportedModel

MAX_CHARS = 8 * 2**20  # of a rendered conversation


class Complaint(TemplateError):
    """The template itself says what is wrong with the conversation."""


class GenerationTags(Extension):
    """`{% generation %}` tells trainers which part the assistant wrote; here it is what stands between the tags."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes of `messages`, `tools`, `add_generation_prompt` and special tokens.

    InvalidInput where the template refuses the conversation, UnsupportedModel where it is itself at fault.
    """
    try:
        return _joined(_compiled(template), variables)
    except Complaint as complaint:
        raise InvalidInput(f"the model's chat template refuses the conversation: {complaint}", "messages") from None
    except SmeltError:
        raise
    except TemplateSyntaxError as error:
        raise UnsupportedModel(f"the model's chat template is not valid: line {error.lineno}: {error}") from None
    except MemoryError:
        raise UnsupportedModel("the model's chat template takes too much memory") from None
    except RecursionError:
        raise UnsupportedModel("the model's chat template calls itself without end") from None
    except Exception as error:  # noqa: BLE001 - a template can raise whatever Python can
        reason = f"{type(error).__name__}: {error}"[:500]
        raise UnsupportedModel(f"the model's chat template fails on this conversation ({reason})") from None


def _joined(template: Template, variables: Mapping[str, Any]) -> str:
    parts, num_chars = [], 0
    for part in template.generate(**variables):
        num_chars += len(part)
        if num_chars > MAX_CHARS:
            raise UnsupportedModel(f"the model's chat template writes more than {MAX_CHARS:,} characters")
        parts.append(part)
    return "".join(parts)


@lru_cache(maxsize=32)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTags, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _complain
    environment.globals["strftime_now"] = _now
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would write for HTML: \\u003c where models are trained on <."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _complain(message: str) -> NoReturn:
    raise Complaint(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
