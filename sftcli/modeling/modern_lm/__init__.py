"""The decoder that comes without a class in transformers: its configuration and its layers."""
