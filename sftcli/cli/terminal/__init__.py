"""Text that is safe to print and fits its width, and tables of it."""
