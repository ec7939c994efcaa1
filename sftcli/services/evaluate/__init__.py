"""``sft eval``: losses and answers -> metrics -> limits and verdict.

``checks`` says how much of an answer is right, by what the answers are. ``tasks`` runs standard tasks, by way of ``lm_eval_bridge``.
"""
