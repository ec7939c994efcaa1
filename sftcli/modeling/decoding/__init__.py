"""A model and prompts -> text, token by token.

``decode`` is the loop, ``sampling`` chooses a token, ``kv_cache`` keeps what was computed, ``fused_decode`` and
``fused_rows`` are a faster forward pass for one token, and ``row_kinds`` tries which way is right for a model.
"""
