"""How many ranks a test takes: two, and four where there are as many GPUs."""

import pytest

WORLDS = pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.multigpu(4))])
