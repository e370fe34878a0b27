"""What the tests of the server have in common: one model, and servers that end with their test."""

import pytest
from running import Running

from flux_core import load_pipeline


@pytest.fixture(scope="package")
def pipeline():
    return load_pipeline("flux-mini", "cpu")


@pytest.fixture
def start(pipeline, tmp_path):
    running = []

    def begin(**settings):
        running.append(Running(pipeline, tmp_path, **settings))
        return running[-1]

    yield begin
    for one in running:
        one.close()
