"""``sft prepare``, and the rows of every other command.

``sources`` finds what the settings name, ``pipeline`` makes examples of it, ``prepare`` keeps them in the cache, and
``capacity`` asks whether a model has room for them.
"""
