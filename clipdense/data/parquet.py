"""Parquet files, which need the optional package pyarrow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipdense.files import atomic_path

__all__ = ["require_pyarrow", "write_rows"]


def require_pyarrow(path: str | Path) -> tuple[Any, Any]:
    """Import the modules ``pyarrow`` and ``pyarrow.parquet``.

    Args:
        path: file that needs them.

    Raises:
        ImportError: If pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path} needs the package pyarrow: pip install 'clipdense[scale]'") from error
    return pyarrow, pyarrow.parquet


def write_rows(
    path: str | Path, groups: Iterable[Sequence[Mapping[str, Any]]], columns: Mapping[str, str]
) -> None:
    """Write a parquet file, atomically and one group of rows at a time.

    Args:
        path: file to write.
        groups: rows; each group becomes a row group of the file. A missing value is null.
        columns: name -> pyarrow's name of the type, such as "int64" or "string"; "list<T>" for lists of T.

    Raises:
        ImportError: If pyarrow is not installed.
        WriteError: If the file cannot be written; the old file is unchanged.
    """
    arrow, parquet = require_pyarrow(path)

    def type_of(name: str) -> Any:
        element = name.removeprefix("list<").removesuffix(">")
        kind = arrow.type_for_alias(element)
        return kind if element == name else arrow.list_(kind)

    schema = arrow.schema([(column, type_of(name)) for column, name in columns.items()])
    with atomic_path(path) as partial, parquet.ParquetWriter(partial, schema) as writer:
        for rows in groups:
            if rows:
                writer.write_table(arrow.Table.from_pylist([dict(row) for row in rows], schema=schema))
