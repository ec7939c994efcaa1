"""Events as they come -> the live screen, lines of text, or JSON lines.

``wording`` says each event once for all of them.
"""
