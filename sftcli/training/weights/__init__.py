"""Trained weights: float32 masters, full or sharded."""
