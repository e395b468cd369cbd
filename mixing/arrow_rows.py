"""Rows of Arrow as Python values, where some of their text may be damaged."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

Values = Mapping[str, object]
"""Column to value."""


def rows_of(table: pa.Table | pa.RecordBatch) -> list[Values | str]:
    """Every row, or in the place of one whose text is not UTF-8 what is wrong with it."""
    try:
        rows: list[Values | str] = table.to_pylist()
    except UnicodeDecodeError:
        return [_row(table.slice(row, 1)) for row in range(table.num_rows)]
    return rows


def check_layout(table: pa.Table) -> None:
    """Raise ArrowInvalid if lengths and offsets lead out of a table's memory. They stand in the file, nobody checks them, and to follow them can end the process.

    Reads no image, but all text and all offsets. Text that is not UTF-8 is left to `rows_of`, for it spoils its row alone.
    """
    for column in table.itercolumns():
        for chunk in column.chunks:
            try:
                chunk.validate(full=True)
            except pa.ArrowInvalid as error:
                if "UTF8" not in str(error):  # pyarrow 26 looks at the offsets before the text
                    raise


def _row(row: pa.Table | pa.RecordBatch) -> Values | str:
    values: dict[str, object] = {}
    for name in row.schema.names:
        try:
            (values[name],) = row.column(name).to_pylist()
        except UnicodeDecodeError:
            return f"'{name}' is not UTF-8; save it as UTF-8"
    return values
