"""Tokenised documents as an Arrow stream of rows `input_ids`, one a document; read in place from the file.

`datasets.Dataset.from_file` opens the same file.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BATCH = 2**22  # tokens of a record batch, or one longer document


def write_arrow(path: Path, documents: Iterable[NDArray[Any]], dtype: np.dtype[Any]) -> None:
    """Memory: one record batch."""
    schema = pa.schema({"input_ids": pa.large_list(pa.from_numpy_dtype(dtype))})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        rows: list[NDArray[Any]] = []
        held = 0
        for row in documents:
            rows.append(row)
            held += len(row)
            if held >= BATCH:
                writer.write_batch(_batch(rows, schema))
                rows, held = [], 0
        if rows:
            writer.write_batch(_batch(rows, schema))


def _batch(rows: list[NDArray[Any]], schema: pa.Schema) -> pa.RecordBatch:
    offsets = np.cumsum([0, *map(len, rows)])
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))
    return pa.RecordBatch.from_arrays([lists], schema=schema)


class ArrowTokens:
    """The tokens of all rows, one after another, without reading the file before they are asked for."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._file = np.memmap(path, np.uint8, mode="r")
        size = np.dtype(dtype).itemsize
        starts, shifts, count = [], [], 0
        with pa.ipc.open_stream(pa.py_buffer(self._file)) as reader:
            for batch in reader:
                values = batch.column(0).values
                place = values.buffers()[1].address - self._file.ctypes.data
                starts.append(count)
                shifts.append(place // size - count)  # Arrow aligns buffers to 8 bytes
                count += len(values)
        self._starts, self._shifts = np.array(starts), np.array(shifts)
        self._values = self._file[: len(self._file) // size * size].view(dtype)

    def take(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Tokens at positions among all of them, in the file's type."""
        if len(self._starts) == 1:
            return self._values[positions + self._shifts[0]]
        batch = np.searchsorted(self._starts, positions, side="right") - 1
        return self._values[positions + self._shifts[batch]]
