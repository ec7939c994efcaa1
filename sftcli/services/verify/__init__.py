"""``sft export --verify-server``: whether a running server answers held-out conversations as the model was trained to.

``prompts`` and ``answers`` compare one conversation, ``verify`` asks both sides and sums up.
"""
