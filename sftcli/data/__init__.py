"""From files to batches.

A value passes through ``reading`` (bytes -> records), ``conversations`` (records -> conversations), ``rendering``
(conversations -> token ids and loss mask), ``prepared`` (rows on disk) and ``batches`` (what the trainer is given).
``quality`` is what is said about rows on the way; ``example`` is a row as tokens.
"""
