"""Checks that know the task: what an answer gets right, beside exact match.

``table`` has all of them and finds those that fit the expected answers. Each is a module of its own behind the protocol of
``check``; ``grading`` grades the answers of both models and compares them. None needs torch.
"""
