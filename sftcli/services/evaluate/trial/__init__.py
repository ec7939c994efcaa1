"""``sft try``: whether fine-tuning is needed. Held-out rows are answered by the base, with and without examples in the prompt.

``pool`` has the training rows that may be examples, ``prompts`` puts them in front of a question, ``trial`` asks and compares.
"""
