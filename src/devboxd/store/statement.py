"""Statements of the hot path: built by SQLAlchemy once, run by the driver itself.

`Connection.execute` costs five times as much as SQLite's own work on a point read, and every request makes several.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any, cast

from sqlalchemy import Connection
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql import ClauseElement


class Statement:
    """One statement with named parameters. Rows are plain tuples: SQLite gives its booleans as 0 and 1."""

    def __init__(self, statement: ClauseElement) -> None:
        compiled = statement.compile(dialect=sqlite.dialect(paramstyle="named"))
        self._text = str(compiled)
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}

    def run(self, connection: Connection, values: Mapping[str, Any]) -> sqlite3.Cursor:
        """Run it in the transaction of `connection`. Raises sqlite3.Error, which Store translates."""
        driver = cast(sqlite3.Connection, connection.connection.driver_connection)
        return driver.execute(self._text, {**self._constants, **values})

    def one(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """The first row, or None."""
        return self.run(connection, values).fetchone()
