"""Records -> conversations.

``detect`` finds the format of a source, ``row_reader`` reads its rows by way of ``convert`` and ``turns``, and
``heldout_split`` says which of them are held out. ``keys`` knows those that change what a row says, and refuses or drops them.
``traces``, ``trees`` and ``tokenized`` read rows of other kinds; ``as_messages`` writes a conversation back as a row.
"""
