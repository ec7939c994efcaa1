"""What a person reads of a run: the page, its charts, the model card, and the measures that they state."""
