"""Running model servers: an address as a person types it, requests that are repeated within limits, and what each kind answers.

``address`` reads names, ``connection`` sends and checks, ``dialects`` speaks to each kind of server, ``several`` asks several prompts at once.
"""
