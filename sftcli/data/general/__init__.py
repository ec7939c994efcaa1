"""Text that has nothing to do with anybody's rows: passages and questions, to see what a model has forgotten.

``general.jsonl`` was written for this program and has its license. It is short, so that scoring it costs little, and it must
not be changed without a new ``VERSION``: losses on it are compared with earlier ones.
"""
