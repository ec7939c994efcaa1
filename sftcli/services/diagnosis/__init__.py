"""What the numbers of a run say: warnings while it goes on, and the verdict at its end."""
