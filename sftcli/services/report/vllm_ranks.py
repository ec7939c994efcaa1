"""Which ranks of adapters vLLM has room for."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""That ``--max-lora-rank`` takes, as ``MaxLoRARanks`` of vLLM lists them."""
DEFAULT_RANK = 16


def room_for(rank: int) -> int | None:
    """Return what vLLM has to be told to have room for an adapter of ``rank``; None where nothing, or nothing helps."""
    return None if rank <= DEFAULT_RANK else next((room for room in RANKS if room >= rank), None)
