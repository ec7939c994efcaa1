"""What is set for libraries before they start, and what a user set stays."""

import os
import sys

import pytest

from sftcli.environment import set_defaults

OLD, NEW = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory does not grow in place")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {NEW: "expandable_segments:True"}),
        ({NEW: "max_split_size_mb:64"}, {NEW: "max_split_size_mb:64"}),
        ({OLD: "max_split_size_mb:64"}, {OLD: "max_split_size_mb:64"}),
        ({NEW: ""}, {NEW: ""}),
    ],
)
def test_memory_on_cuda_may_grow_in_place_unless_a_user_said_how(given, expected, monkeypatch):
    for name in (OLD, NEW):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for name in (
        "OMP_WAIT_POLICY",
        "GOMP_SPINCOUNT",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
        "LRU_CACHE_CAPACITY",
    ):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    set_defaults()
    assert {name: os.environ[name] for name in (OLD, NEW) if name in os.environ} == expected
