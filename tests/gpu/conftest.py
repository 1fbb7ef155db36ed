"""Everything here needs a CUDA GPU and exllamav3; elsewhere it is skipped, with the reason."""

import importlib

import pytest

from backends import lacks_cuda, missing_library


def lack():
    return missing_library("exllamav3") or lacks_cuda(importlib.import_module("torch"))


@pytest.fixture(scope="session", autouse=True)
def gpu():
    if reason := lack():
        pytest.skip(reason)
