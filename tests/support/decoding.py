"""Answers of a decoder, all at once."""

from collections.abc import Sequence

from sftcli.config.schema.run import SamplingSettings
from sftcli.events import NeverStop
from sftcli.modeling.decoding.decode import Row, decode
from sftcli.modeling.decoding.decoder import Decoder


def answers(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    stop=None,
    stop_ids=frozenset(),
    max_rows=32,
    **settings,
) -> list[Row]:
    """Decode every prompt to its end; return the rows in the order of the prompts."""
    rows = decode(
        decoder,
        prompts,
        settings=SamplingSettings(**settings),
        stop_ids=stop_ids,
        stop=stop or NeverStop(),
        max_rows=max_rows,
    )
    ended = {row.index: row for row in rows if row.finish}
    return [ended[index] for index in range(len(prompts))]
