"""The training engine: a loop that prints nothing, opens no file and reads no clock but the one it is given.

``trainer`` takes a step: batches of ``data`` -> ``loss`` -> gradients -> ``optim`` -> ``weights``, and says so in
events. ``probes`` try a model before it trains, ``checkpoint`` keeps ``state`` on disk, ``distributed`` lets several
processes be one.
"""
