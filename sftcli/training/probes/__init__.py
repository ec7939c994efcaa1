"""Trials on the real model and real rows before a training: loss, packing, faster layers, memory and time."""
