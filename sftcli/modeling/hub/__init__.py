"""Models of the hub -> snapshots on this disk.

``snapshot`` asks for one, and ``worker`` downloads it in a process of its own that can be killed.
"""
