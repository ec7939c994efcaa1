"""``sft generate``: a prompt, a file of prompts, or a conversation -> answers. ``answerer`` holds the model."""
