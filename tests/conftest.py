"""What holds for every test: few threads, a fixed seed, hypothesis without chance."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(2)
settings.register_profile("laconic", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("laconic")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
