"""Prepared rows as a folder that other trainers read: Parquet files with the columns that they look for, whole or absent.

DIR/
  train.parquet        one row an example
  validation.parquet   the held-out rows, where there are some
  text.parquet         plain text to mix in, where there is some
  audit.json           what it was made of, and what became of every row

``datasets.load_dataset("DIR")`` finds the splits. The columns: ``input_ids``; ``attention_mask``, all 1; ``labels``, the id
where there is loss and -100 elsewhere, not shifted; ``completion_mask``, 1 where there is loss; ``origin``, the place the
row comes from; ``flags``, what was noticed about it.
"""

from pathlib import Path

import numpy as np

from sftcli import storage
from sftcli.data.prepared.store import ExampleTable, PreparedDataset
from sftcli.errors import OutputError
from sftcli.json_files import write_json

IGNORED = -100
ROWS_PER_GROUP = 1024
_HINT = "choose another folder with --out"


def write_rows(dataset: PreparedDataset, folder: Path) -> None:
    """Write all examples of ``dataset`` to ``folder``.

    Raises:
        OutputError: The folder exists, or cannot be made.
        StorageError: The disk is full.
    """
    tables = {"train": dataset.train, "validation": dataset.heldout, "text": dataset.text}
    try:
        with storage.atomic_folder(folder, hint=_HINT, is_new=True) as fresh:
            for name, table in tables.items():
                if len(table):
                    _write_table(table, fresh / f"{name}.parquet")
            write_json(fresh / "audit.json", dataset.about.to_json())
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"cannot make {folder}: {error.strerror}", hint=_HINT) from error


def _write_table(table: ExampleTable, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {
            "input_ids": pa.list_(pa.int32()),
            "attention_mask": pa.list_(pa.int8()),
            "labels": pa.list_(pa.int32()),
            "completion_mask": pa.list_(pa.int8()),
            "origin": pa.string(),
            "flags": pa.list_(pa.string()),
        }
    )
    with storage.FileSink(storage.disk.create(path)) as sink, pq.ParquetWriter(sink, schema) as writer:
        for begin in range(0, len(table), ROWS_PER_GROUP):
            examples = [table[row] for row in range(begin, min(begin + ROWS_PER_GROUP, len(table)))]
            offsets = np.cumsum([0, *(len(example.input_ids) for example in examples)]).astype(np.int32)
            ids = np.concatenate([example.input_ids for example in examples])
            mask = np.concatenate([example.loss_mask for example in examples])
            columns = [
                ids,
                np.ones(len(ids), dtype=np.int8),
                np.where(mask, ids, np.int32(IGNORED)),
                mask.astype(np.int8),
            ]
            arrays = [pa.ListArray.from_arrays(offsets, column) for column in columns]
            arrays.append(pa.array([str(example.origin) for example in examples], pa.string()))
            arrays.append(pa.array([sorted(example.flags) for example in examples], pa.list_(pa.string())))
            writer.write_batch(pa.record_batch(arrays, schema=schema))
