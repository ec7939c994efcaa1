"""Records -> conversations.

``detect`` finds the format of a source, ``row_reader`` reads its rows by way of ``convert`` and ``turns``, and
``heldout_split`` says which of them are held out. ``meaning`` knows the keys that change what a row says;
``key_checks``, ``rivals``, ``markup`` and ``dropped_keys`` refuse or drop them.
"""
