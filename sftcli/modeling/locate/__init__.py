"""What a user names as a model -> a folder on this disk.

``locate`` is the front; ``default_model`` knows the model that is used when none is named, and ``package_index``
fetches it.
"""
