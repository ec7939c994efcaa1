"""What two runs have not in common: rows, settings, versions, losses and answers, read from the files that they left.

``compare`` puts a ``Difference`` together of ``rows``, ``settings`` and ``answers``; the paired test is in ``answers``, which
``sft eval --against`` asks too. No model is loaded.
"""
