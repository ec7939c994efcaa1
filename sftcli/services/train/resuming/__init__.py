"""What a run goes on from: its checkpoints, whether settings and data still fit to them, and what it means to train it longer."""
