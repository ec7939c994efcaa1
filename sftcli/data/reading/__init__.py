"""Bytes -> records, each with its place.

``source`` understands what a user names, ``text_lines`` opens it, ``json_rows``, ``table_rows`` and ``hub_rows`` know one
kind of storage each, and ``records`` puts them in front of the rest as one stream.
"""
