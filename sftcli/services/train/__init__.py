"""``sft train`` and ``sft resume``, in one process or several.

``lead`` opens or takes up a run in the first process, ``worker`` is what every process does: ``inputs`` (rows, model
folder) -> ``build`` (model, trainer) -> fit -> ``outcome``. ``resume`` finds the ``resume_point`` and checks
``compatibility``; ``decisions`` keeps what was measured at the start; ``plan`` is ``--plan``.
"""
