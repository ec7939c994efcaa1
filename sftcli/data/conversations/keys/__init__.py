"""What the keys of a row mean: read, harmless, or refused by name because nothing reads them.

``meaning`` is the table; ``key_checks`` looks through rows, turns and parts, ``rivals`` through columns that compete, ``markup`` through running
text; ``dropped_keys`` takes out what is dropped on purpose.
"""
