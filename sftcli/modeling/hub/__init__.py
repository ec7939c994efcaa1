"""Models of the hub -> snapshots on this disk, and folders of this disk -> the hub.

``snapshot`` asks for one, ``upload`` brings a folder there, and ``worker`` does either in a ``process`` of its own that can be killed.
"""
