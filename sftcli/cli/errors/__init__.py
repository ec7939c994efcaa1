"""What went wrong -> a message with its place and the way out, and the exit code."""
