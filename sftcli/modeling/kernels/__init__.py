"""What runs a layer faster and changes no result but by rounding.

``fuse`` puts faster forms in the place of parts of a model that they fit: ``ways`` says which are tried on which device, from
``fused_layer`` on a processor to ``liger`` and ``low_rank`` (adapters) on a GPU. ``compiled`` lets torch compile the layers instead. ``document_attention``
lets packed rows see only their own document, by way of ``cpu_attention`` on a processor; ``experts`` is for comparisons only.
"""
