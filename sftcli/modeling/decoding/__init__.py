"""A model and prompts -> tokens.

``decoder`` chooses how a model is decoded: by ``fused_decode``, a faster pass for the families it knows, or with one of the
caches of ``kv_cache``. ``decode`` is the loop, which yields tokens as ``sampling`` draws them.
"""
