"""Special tokens of a checkpoint: any of several ends a row as in transformers, and both files round-trip."""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, build, small, tokens

from dsv3lib import DeepSeekV3
from dsv3lib.checkpoint.generation_config import stop_tokens
from dsv3lib.inference.generate import generate, stream

SIZE = small(vocab_size=12, num_nextn_predict_layers=1)
IDS = st.integers(0, 11)
ENDS = IDS | st.lists(IDS, min_size=1, max_size=5, unique=True)


def write(folder: Path, seed: int, in_config: Any, in_generation: Any) -> DeepSeekV3:
    build(SIZE, seed).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text()) | {"eos_token_id": in_config, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(fields))
    if in_generation is not ...:
        said = {"_from_model_config": True, "eos_token_id": in_generation, "pad_token_id": 0, "temperature": 0.6,
                "do_sample": False, "transformers_version": "5.23.0"}  # fmt: skip
        (folder / "generation_config.json").write_text(json.dumps(said))
    return DeepSeekV3.from_pretrained(folder)


@settings(max_examples=6)
@given(seed=SEEDS, in_config=ENDS, in_generation=ENDS | st.just(...))
def test_rows_end_where_transformers_ends_them(seed: int, in_config: Any, in_generation: Any) -> None:
    from transformers import DeepseekV3ForCausalLM

    prompts = tokens(SIZE, 3, 4, seed)
    with tempfile.TemporaryDirectory() as path:
        ours = write(Path(path), seed, in_config, in_generation)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = DeepseekV3ForCausalLM.from_pretrained(path)
            expected = theirs.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, do_sample=False
            )
        assert torch.equal(ours.generate(prompts, 12), expected)
        for row in prompts:
            alone = ours.generate(row[None], 12)
            assert torch.equal(alone, ours.generate(row[None], 12, speculative=True))
            streamed = [int(t) for t in stream(ours, row[None], 12)]
            assert alone[0, 4:].tolist() == streamed


@settings(max_examples=12)
@given(in_config=ENDS | st.none(), in_generation=ENDS | st.none() | st.just(...))
def test_both_files_round_trip(in_config: Any, in_generation: Any) -> None:
    with tempfile.TemporaryDirectory() as path:
        first, second = Path(path) / "first", Path(path) / "second"
        model = write(first, 0, in_config, in_generation)
        model.save_pretrained(second)
        assert json.loads((second / "config.json").read_text())["eos_token_id"] == in_config
        if in_generation is ...:
            assert not (second / "generation_config.json").exists()
        else:
            names = [folder / "generation_config.json" for folder in (first, second)]
            assert json.loads(names[0].read_text()) == json.loads(names[1].read_text())
        assert DeepSeekV3.from_pretrained(second).config == model.config


def test_where_it_names_no_end_the_configuration_s_holds() -> None:
    config = SIZE.replace(eos_token_id=(3, 5))
    assert stop_tokens(config, {"temperature": 1.0}) == stop_tokens(config, None) == (3, 5)
    assert stop_tokens(config, {"eos_token_id": [7, 99, -1]}) == (7,)  # the model has no token 99


@pytest.mark.parametrize("text", ["{", "[1]", "\x00", '"eos"'])
def test_a_damaged_file_is_passed_over_with_a_word(text: str, tmp_path: Path) -> None:
    build(SIZE).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.warns(UserWarning, match=r"generation_config\.json: is passed over"):
        assert DeepSeekV3.from_pretrained(tmp_path).generation_config is None


def test_a_caller_s_own_stop_tokens_go_first(tmp_path: Path) -> None:
    model = write(tmp_path, 0, [1, 2], [3, 4])
    ids = tokens(SIZE, 1, 4)
    free = generate(model, ids, 12, stop_tokens=())
    assert free.shape == (1, 16)
    stop = int(free[0, 5])
    assert generate(model, ids, 12, stop_tokens=[stop])[0, -1] == stop
