"""What runs a layer faster and changes no result but by rounding.

``fuse`` puts ``fused_layer`` in the place of layers of a model that it fits; ``document_attention`` lets packed rows
see only their own document, by way of ``cpu_attention`` on a processor; ``experts`` is for comparisons only.
"""
