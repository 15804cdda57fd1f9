"""Settings of kernels: the first row that fits, the most particular file, and words for what is wrong."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.errors import KernelError
from dsv3lib.kernels.toolchain import targets, tuning

CPU = torch.device("cpu")
ROWS = [
    {"when": {"M": [1, 64], "N": [128, 128]}, "BLOCK_M": 16},
    {"when": {"M": [1, 64]}, "BLOCK_M": 64},
    {"when": {}, "BLOCK_M": 128},
]


@given(m=st.integers(0, 300), n=st.sampled_from([128, 256]))
def test_the_first_row_that_fits_is_taken(m, n):
    expected = 128 if not 1 <= m <= 64 else 16 if n == 128 else 64
    assert tuning.match("op", ROWS, {"M": m, "N": n}) == {"BLOCK_M": expected}


def test_a_bound_on_an_unknown_size_and_a_table_without_a_last_resort_are_named():
    with pytest.raises(KernelError, match=r"bound \['N'\].*\['M'\]"):
        tuning.match("op", ROWS, {"M": 1})
    with pytest.raises(KernelError, match="no row of settings fits"):
        tuning.match("op", ROWS[:2], {"M": 65, "N": 128})


def test_without_a_gpu_what_ships_for_hopper_is_picked():
    assert tuning.sources(CPU) == ("sm_90",)
    with pytest.raises(KernelError, match="no_such_op: no settings in sm_90"):
        tuning.pick("no_such_op", CPU, M=1)


@pytest.mark.parametrize(
    ("capability", "name", "expected"),
    [
        ((9, 0), "NVIDIA H200", ("nvidia_h200", "sm_90")),
        ((9, 0), "NVIDIA H800", ("sm_90",)),
        ((8, 6), "NVIDIA GeForce RTX 3090", ("sm_80",)),
        ((8, 9), "NVIDIA L4", ("sm_89",)),
        ((12, 0), "NVIDIA RTX PRO 6000", ("sm_100",)),
        ((7, 5), "Tesla T4", ("sm_80",)),
    ],
)
def test_a_device_finds_its_own_file_then_its_generations(monkeypatch, tmp_path, capability, name, expected):
    for generation in (*tuning.GENERATIONS, "nvidia_h200"):
        tuning.write(tmp_path / f"{generation}.json", "for a test", "sm_90", {"op": ROWS})
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(targets, "capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert tuning.sources.__wrapped__(torch.device("cuda")) == expected


def test_written_settings_are_read_back_one_row_a_line(tmp_path):
    path = tmp_path / "nvidia_h200.json"
    tuning.write(path, "measured on a test", "sm_90", {"op": ROWS, "another": ROWS[2:]})
    assert tuning.read(path) == {"op": ROWS, "another": ROWS[2:]}
    assert tuning.generation_of(path) == "sm_90"
    assert sum('"when"' in line for line in path.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "content",
    ["{", '{"op": []}', '{"op": [{"BLOCK_M": 1}]}', '{"op": [{"when": {"M": [1, 2]}}]}', '{"op": 3}'],
)
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(KernelError, match=r"broken\.json"):
        tuning.read.__wrapped__(path)


@pytest.mark.parametrize("generation", tuning.GENERATIONS)
def test_what_ships_can_be_read_and_speaks_for_its_generation(generation):
    path = tuning.FOLDER / f"{generation}.json"
    assert tuning.read(path) and tuning.generation_of(path) == generation
    assert "about" in json.loads(path.read_text())
    assert tuning.read(path) in tuning.shipped(generation)
