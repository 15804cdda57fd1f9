"""Sharded files: the index decides which tensor counts, whatever else lies in the shards."""

import json
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_folders import INDEX, SINGLE, assert_same, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import build, small

from dsv3lib import DeepSeekV3
from dsv3lib.errors import CheckpointError

MODEL = build(
    small(hidden_size=136, vocab_size=20, num_nextn_predict_layers=0), dtype=torch.bfloat16
)  # so wide that a matrix has several scales


def save(folder: Path, fp8: bool) -> dict[str, str]:
    """Write MODEL in many shards; by tensor the file that the index names."""
    MODEL.save_pretrained(folder, max_shard_bytes=60_000, fp8=fp8)
    return json.loads((folder / INDEX).read_text())["weight_map"]


def add(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(load_file(path) | tensors, path)


def point(folder: Path, name: str, file: str | None) -> None:
    """Let the index name another file for a tensor, or none."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].pop(name)
    if file is not None:
        index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


@settings(max_examples=6)
@given(data=st.data(), fp8=st.booleans(), stale=st.integers(1, 3))
def test_a_stale_tensor_in_another_shard_never_wins(data: st.DataObject, fp8: bool, stale: int) -> None:
    """Weights and scales alike, of whichever shard comes first."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        weight_map = save(folder, fp8)
        expected = state_of(DeepSeekV3.from_pretrained(folder))
        files, strays = sorted(set(weight_map.values())), {}
        for _ in range(stale):
            name = data.draw(st.sampled_from(sorted(weight_map)))
            other = data.draw(st.sampled_from([f for f in files if f != weight_map[name]]))
            shape = load_file(folder / weight_map[name])[name].shape
            strays[name] = other
            add(folder / other, {name: torch.full(shape, 60_000.0)})
        with pytest.warns(UserWarning, match=r"passed over \d+ tensor.*index\.json does not name") as told:
            back = DeepSeekV3.from_pretrained(folder)
        assert len(told) == 1
        assert_same(expected, state_of(back))


@settings(max_examples=5)
@given(data=st.data(), fp8=st.booleans())
def test_a_tensor_that_is_not_where_the_index_says_is_an_error_that_says_where(data, fp8) -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        weight_map = save(folder, fp8)
        name = data.draw(st.sampled_from(sorted(weight_map)))
        other = data.draw(st.sampled_from(sorted(set(weight_map.values()) - {weight_map[name]})))
        point(folder, name, other)
        with pytest.raises(CheckpointError) as caught:
            DeepSeekV3.from_pretrained(folder)
        assert f"promises {name}, which {other} does not hold; {weight_map[name]} does" in str(caught.value)


@settings(max_examples=5)
@given(data=st.data())
def test_a_tensor_that_the_index_does_not_name_is_not_there(data: st.DataObject) -> None:
    """A weight is then missing; what no model of this configuration has is a stray and nothing more."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        weight_map = save(folder, fp8=False)
        own = [
            n
            for n in weight_map
            if not n.endswith(("layers.2.embed_tokens.weight", "shared_head.head.weight"))
        ]
        name = data.draw(st.sampled_from(sorted(own)))
        add(folder / weight_map[name], {"model.layers.7.ghost.weight": torch.ones(2)})
        with pytest.warns(UserWarning, match=r"model\.layers\.7\.ghost\.weight"):
            back = DeepSeekV3.from_pretrained(folder)
        assert_same(state_of(MODEL), state_of(back))
        point(folder, name, None)
        with warnings.catch_warnings(), pytest.raises(CheckpointError, match=f"missing.*{name}"):
            warnings.simplefilter("ignore")
            DeepSeekV3.from_pretrained(folder)


def test_a_single_file_beside_an_index_is_passed_over(tmp_path: Path) -> None:
    build(small(hidden_size=136, vocab_size=20, num_nextn_predict_layers=0), seed=1).save_pretrained(tmp_path)
    stale = (tmp_path / SINGLE).read_bytes()
    save(tmp_path, fp8=False)
    (tmp_path / SINGLE).write_bytes(stale)
    with pytest.warns(UserWarning, match=r"passed over model\.safetensors, as .*index"):
        back = DeepSeekV3.from_pretrained(tmp_path)
    assert_same(state_of(MODEL), state_of(back))
