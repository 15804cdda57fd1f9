"""One reading of --device: what works is found before anything is loaded, what does not is named."""

import pytest
import torch

from dsv3lib.devices import find_device
from dsv3lib.errors import InputError


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    for name in (None, "auto"):
        for there, expected in ((False, "cpu"), (True, "cuda")):
            monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
            assert find_device(name) == torch.device(expected)
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["abacus", "cpu:x", "meta", "", "cuda:99"])
def test_what_is_not_there_is_refused_by_name(name):
    with pytest.raises(InputError, match=f"--device: '{name}' cannot be used .*auto .*cpu or cuda"):
        find_device(name)


def test_cuda_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device: 'cuda' cannot be used .*dsv3 doctor"):
        find_device("cuda")
