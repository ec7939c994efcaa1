"""Model folders and files of weights, in and out.

``folder_check`` and ``remote_code`` look at a folder before it is opened, ``identity`` tells whether it is the one that
was trained on; ``folder_write`` writes one, and
``written`` compares it with what it was to hold (``stored_tensors``, ``source_tensors``, ``older_config``).
``gguf_...`` and ``pt_...`` are other formats.
"""
