"""``sft generate --keep``: the answers of a model as rows that another one can be trained on.

``apart`` leaves out prompts that stand in held-out rows, ``rows`` chooses answers and writes them.
"""
