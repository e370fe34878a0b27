"""Fixtures for whoever needs a model on the disk. This file also puts `tests/` on the path of its folders."""

import gc
import io
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; torch reads this when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if find_spec("triton"):  # which reads this when it is imported: without a card its kernels run in its interpreter
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports leave nothing to collect, and to look for it takes a quarter of their time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def thawed_in_the_end():
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def collector_leaves_alone_what_is_imported(thawed_in_the_end):
    """Which stays to the end: to go through it again and again took a third of all tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def cards_left_as_they_were(request):
    """A test on a card begins with nothing there but what fixtures of its module hold, and leaves no more."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    from card import MOST, allocated, release

    release()
    before = allocated()
    yield
    failed = hasattr(sys, "last_value")  # its frames hold whatever it had
    release()
    left = allocated() - before
    assert failed or left < MOST, f"{left / 2**20:.0f} MiB of tensors are left on the card"


@pytest.fixture(autouse=True)
def kernels_left_as_they_were():
    """Functions that a test installs for the CPU are gone after it: branches of LoRAs would sum in another order."""
    from flux_core.linears.branch import THIN

    before = dict(THIN)
    yield
    THIN.clear()
    THIN.update(before)


@pytest.fixture(scope="session", autouse=True)
def loras_remembered_elsewhere(tmp_path_factory):
    """The user's own list of LoRA files is left alone."""
    from flux_core.lora import known

    place = tmp_path_factory.mktemp("known") / "loras.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "_place", lambda: place)
        yield


@pytest.fixture(scope="session")
def small_root(tmp_path_factory):
    """A folder of weights as `weights/`, with a small random model under the name of flux-mini."""
    from random_model import small_variant, write_model

    root = tmp_path_factory.mktemp("weights")
    write_model(root / "flux-mini", small_variant())
    return root


@pytest.fixture
def small(small_root, monkeypatch):
    """The row of that model, which stands in for flux-mini while the test runs."""
    from random_model import small_variant

    from flux_core.hub import places
    from flux_core.variants import VARIANTS

    row = small_variant()
    monkeypatch.setattr(places, "ROOTS", (small_root,))
    monkeypatch.setitem(VARIANTS, "flux-mini", row)
    for variable in ("FLUX_MODEL", "FLUX_AE"):
        monkeypatch.delenv(variable, raising=False)
    return row


@pytest.fixture
def one_thread():
    """For networks so small that starting a second thread costs more than their whole forward."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def reads(monkeypatch):
    """Of every read of a file that `Path.open` opened while the test runs: bytes asked for, and bytes that came."""
    found, plain = [], Path.open

    class Counted(io.FileIO):
        def readinto(self, buffer):
            count = super().readinto(buffer)
            found.append((len(buffer), count))
            return count

    def opened(path, mode="r", *args, **kwargs):
        return io.BufferedReader(Counted(path)) if mode == "rb" else plain(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    return found
