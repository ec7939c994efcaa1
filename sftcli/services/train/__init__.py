"""``sft train`` and ``sft resume``, in one process or several.

``lead`` opens or takes up a run in the first process, ``worker`` takes part in the others. Both take a ``TrainingRun`` (``run``)
from ``inputs`` (rows, model folder) -> ``build`` (model, trainer) -> fit -> outcome, as ``resume --verify`` and ``plan`` do
in part. ``resume`` finds the ``resume_point`` and checks ``compatibility``; ``decisions`` keeps what was measured at the start.
"""
