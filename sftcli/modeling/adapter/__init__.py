"""Low-rank adapters: which layers get one, how it is laid on a model, and its folder."""
