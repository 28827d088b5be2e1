"""Statements that every request runs, prepared once: composing and examining one costs more than running it.

Knows no table. What they return is as the driver gives it: SQLite's truth values are 0 and 1.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, CursorResult, Dialect
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
