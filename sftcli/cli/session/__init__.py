"""What surrounds a command: its view, signals, several processes, and a conversation at the prompt."""
