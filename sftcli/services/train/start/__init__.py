"""What is settled before a training begins.

Slips in names, what it goes on from, settings that follow from rows and model, its inputs, and what machine, disk and several
processes allow.
"""
