"""The keys: one class for each section of a configuration, with defaults, ranges and descriptions."""
