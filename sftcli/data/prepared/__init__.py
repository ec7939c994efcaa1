"""Prepared rows on disk: memory-mapped Arrow files for ``sft train``, Parquet files for other trainers."""
