"""The state of a training -> files, and back.

``store`` holds the checkpoints of a run and lets old ones go, ``format`` writes and reads one, ``names`` knows the
folders, ``rewind`` keeps later checkpoints while a run goes on from an earlier one, and ``background_saver`` writes
beside the training.
"""
