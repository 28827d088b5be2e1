"""Flags from a config class: every field is an option, kebab-case or with underscores; knows no particular config.

Values stay text here; the class itself parses and checks them, so flags, YAML and JSON obey one schema.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click
from pydantic.fields import FieldInfo

from smelt.configs import Config, flag_text, read_config_file


class ConfigCommand(click.Command):
    """A command whose flags are the fields of a config class, under a heading per section in its help."""

    def __init__(self, config_class: type[Config], sections: Mapping[str, tuple[str, ...]], **settings: Any) -> None:
        names = [name for section in sections.values() for name in section]
        options = [field_option(name, config_class.model_fields[name]) for name in names]
        config_file = click.Option(
            ["--config"], metavar="FILE", help="YAML or JSON file with the same keys as the flags."
        )
        settings["context_settings"] = {"token_normalize_func": lambda name: name.replace("_", "-")}
        super().__init__(params=[config_file, *options], **settings)
        self.sections = sections  # the fields under each heading

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The flags under their headings."""
        rows = {parameter.name: parameter.get_help_record(ctx) or ("", "") for parameter in self.get_params(ctx)}
        named = {name for section in self.sections.values() for name in section}
        self._write_section(formatter, "Options", [row for name, row in rows.items() if name not in named])
        for heading, names in self.sections.items():
            self._write_section(formatter, heading, [rows[name] for name in names])

    def _write_section(self, formatter: click.HelpFormatter, heading: str, rows: list[tuple[str, str]]) -> None:
        with formatter.section(heading):
            formatter.write_dl([row for row in rows if any(row)])


def field_option(name: str, field: FieldInfo) -> click.Option:
    """An option for one field. Where `true` is a value, the bare flag means it."""
    may_be_bare = field.annotation is bool or "true" in get_args(field.annotation)
    default = f"  [default: {flag_text(field.default)}]"
    if field.is_required() or field.default is None:
        default = ""
    return click.Option(
        [f"--{name.replace('_', '-')}", name],
        metavar="BOOL" if field.annotation is bool else metavar_of(field),
        is_flag=False,
        flag_value="true" if may_be_bare else None,
        help=f"{field.description}{default}",
    )


def metavar_of(field: FieldInfo) -> str:
    """A word for the kind of value, as pydantic knows it."""
    kinds = {argument for argument in (*get_args(field.annotation), field.annotation) if argument is not type(None)}
    for kind, word in ((float, "NUMBER"), (int, "INT")):
        if kind in kinds or any(kind in get_args(part) for part in kinds):
            return word
    return "TEXT"


def given_values(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given over the file that `--config` names."""
    values = {name: value for name, value in flags.items() if value is not None and name != "config"}
    return {**read_config_file(Path(flags["config"])), **values} if flags.get("config") else values


def run_values(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's command was given; of a run that is to go on the saved config takes the file's place."""
    values = given_values(flags)
    if values.get("init_from") != "resume":
        return values
    return {**given_values({**flags, "config": None}), "out_dir": values.get("out_dir"), "init_from": "resume"}
