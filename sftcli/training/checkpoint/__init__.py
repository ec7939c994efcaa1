"""The state of a training -> files, and back.

``store`` names the checkpoints of a run, publishes new ones and lets old ones go; ``format`` writes, verifies and reads one;
``layout`` names its files, and ``together`` lets several processes write it; ``names`` knows the folders; ``rewind`` keeps later
checkpoints while a run goes on from an earlier one; and ``background_saver`` writes beside the training.
"""
