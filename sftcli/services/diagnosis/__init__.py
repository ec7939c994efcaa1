"""Diagnosis of a run from its losses: warnings during training, and the verdict at the end."""
