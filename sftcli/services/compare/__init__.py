"""Short runs that differ in one thing, measured on the same held-out rows.

``axis.py`` reads what is compared, ``start.py`` makes the settings of each run and checks them without torch, ``price.py`` says what all
of it takes, ``run.py`` trains and scores (``score.py``) one run after the other, ``record.py`` keeps what is done so that it goes on,
and ``summary.py`` makes numbers with intervals, and a pick, of the scores.
"""
