"""Which rows of a run may be wrong: the loss of each before and after the training, and what else speaks against it.

``run.py`` scores the rows, ``exchange.py`` puts their answers behind the prompts of others, ``doubt.py`` makes of that how much
speaks for an answer, and ``reasons.py`` and ``traits.py`` say why a row is listed. What was found is ``services/report/ledger.py``.
"""
