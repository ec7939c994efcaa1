"""Prepared rows -> tensors.

``order`` says which rows a step takes, ``packing`` which of them share a row of the model's input, ``batch`` collates them.
"""
