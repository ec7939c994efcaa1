"""Models and tokenizers: locating, loading, writing, faster kernels, and decoding.

``locate`` turns what a user names into a folder, ``load`` makes the model of it, ``adapter`` lays weights beside it
that train alone, ``decoding`` draws text from it, and ``formats`` reads and writes the files of models. ``kernels``
and ``decoding`` stand alone: without them all results are the same, and slower. ``tokenizer`` holds tokens and chat
templates.
"""
