"""Statements that every request runs, prepared once: composing and examining one costs more than running it.

Knows no table. What they return is as the driver gives it: SQLite's truth values are 0 and 1.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import BindParameter, ColumnElement, Connection, CursorResult, Dialect, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.compiler import SQLCompiler


@dataclass(frozen=True, slots=True)
class Text:
    """A statement in the words of one database. `names` in their order where its parameters have no names."""

    text: str
    constants: dict[str, Any]
    names: tuple[str, ...] | None


class Prepared:
    """Run it with a connection and its parameters by name. `columns` are those that an INSERT fills."""

    def __init__(self, statement: ClauseElement, columns: tuple[str, ...] | None = None) -> None:
        self._statement = statement
        self._columns = columns
        self._texts: dict[str, Text] = {}

    def __call__(self, connection: Connection, **parameters: Any) -> CursorResult[Any]:
        """What SQLAlchemy's `execute` would return, for a third of its time."""
        dialect = connection.dialect
        prepared = self._texts.get(dialect.name) or self._prepare(dialect)
        values = prepared.constants | parameters
        if prepared.names is None:
            return connection.exec_driver_sql(prepared.text, values)
        return connection.exec_driver_sql(prepared.text, tuple([values[name] for name in prepared.names]))

    def _prepare(self, dialect: Dialect) -> Text:
        compiled = self._statement.compile(dialect=dialect, column_keys=self._columns)
        assert isinstance(compiled, SQLCompiler), "the statement is SQL"
        names = tuple(compiled.positiontup or ()) if compiled.positional else None
        text = self._texts[dialect.name] = Text(str(compiled), dict(compiled.params), names)
        return text


class Elements(ColumnElement[Any]):
    """What is in a list that comes as one parameter: as many parameters as values would be another text each time."""

    inherit_cache = True

    def __init__(self, name: str, column: ColumnElement[Any]) -> None:
        self.parameter: BindParameter[Any] = bindparam(name)
        self.type = column.type


@compiles(Elements, "sqlite")
def _of_sqlite(elements: Elements, compiler: SQLCompiler, **options: Any) -> str:
    return f"(SELECT value FROM json_each({compiler.process(elements.parameter, **options)}))"


@compiles(Elements, "postgresql")
def _of_postgresql(elements: Elements, compiler: SQLCompiler, **options: Any) -> str:
    parameter = compiler.process(elements.parameter, **options)
    kind = compiler.dialect.type_compiler_instance.process(elements.type)
    return f"(SELECT CAST(json_array_elements_text(CAST({parameter} AS json)) AS {kind}))"


def is_among(column: ColumnElement[Any], name: str) -> ColumnElement[bool]:
    """Whether a column's value is in the list that comes as the parameter of that name."""
    return column.bool_op("IN")(Elements(name, column))


def listed(values: Iterable[str | int]) -> str:
    """A list as such a parameter."""
    return msgspec.json.encode(list(values)).decode()
