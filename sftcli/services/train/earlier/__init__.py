"""What a training that goes on from a run does about the rows of that run, and of those before it.

``rows`` finds them, draws those that are replayed, and keeps both these and the held-out ones in the folder of the new run.
``scores`` measures the held-out ones before the first step and with the final model.
"""
