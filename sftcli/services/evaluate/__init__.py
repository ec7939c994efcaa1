"""``sft eval``: losses and answers -> metrics -> limits and verdict.

``tasks`` runs standard tasks, by way of ``lm_eval_bridge``.
"""
