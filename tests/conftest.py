"""What holds for every test: few threads, a fixed seed, hypothesis without chance."""

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(2 if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1" else 1)
settings.register_profile("laconic", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("laconic")


@pytest.fixture(autouse=True)
def seed():
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # which notes the seed for devices that are not there, too, with a stack trace for each
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def layer_times(tmp_path_factory):
    """Measured layer times go to a place of the tests' own. A millisecond for each block measures the same thing: how exact
    it is follows from the machine, so that no test depends on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LACONIC_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("laconic.timing.SECONDS", 0.001)
        patch.setattr("laconic.timing.ROUNDS", 5)  # the fastest one counts
        patch.setattr("laconic.measure.PATIENCE", 0.2)
        yield


@pytest.fixture
def empty_table(monkeypatch, tmp_path_factory):
    """A table of layer times of the test's own: nothing that other tests have measured."""
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path_factory.mktemp("cache")))
