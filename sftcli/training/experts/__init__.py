"""Routed experts in training: the loss that balances them, and how many tokens each gets."""
