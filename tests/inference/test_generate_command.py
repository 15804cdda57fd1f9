"""dsv3 generate: which model it finds, what it prints, and what it says when it cannot."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib import DeepSeekV3, ModelConfig, cli
from dsv3lib.errors import CheckpointError, InputError
from dsv3lib.inference.generate_command import (
    encode_prompt,
    find_checkpoint,
    read_tokenizer,
    without_controls,
)
from dsv3lib.inference.text_stream import TextStream
from dsv3lib.training.text.tokenizer import default_tokenizer

TOKENIZER = default_tokenizer().backend
VOCAB = TOKENIZER.get_vocab_size(with_added_tokens=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small untrained model with the course's tokenizer, saved as the trainer saves it."""
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig.preset("nano").replace(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, initializer_range=0.3
    )
    DeepSeekV3(config, generator=torch.Generator().manual_seed(0)).save_pretrained(folder)
    default_tokenizer().save(folder)
    return folder


def written(capsys, *argv):
    """The standard output and the error stream of `dsv3 generate ARGV`, which must succeed."""
    status = cli.main(["generate", *map(str, argv)])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return shown.out, shown.err


def refused(capsys, *argv):
    """What `dsv3 generate ARGV`, which must fail, says in its one line."""
    assert cli.main(["generate", *map(str, argv)]) == cli.EXIT_ERROR
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "Traceback" not in shown.err
    return shown.err


# ---- text from tokens ------------------------------------------------------------------------------------


@given(ids=st.lists(st.integers(0, VOCAB - 1), max_size=40), cuts=st.lists(st.integers(1, 4), min_size=40))
def test_the_pieces_joined_are_the_whole_text(ids, cuts):
    """Any tokens at all, most of them broken characters, one or a few at a time."""
    text, pieces, place = TextStream(TOKENIZER), [], 0
    for cut in cuts:
        pieces.append(text.add(ids[place : place + cut]))
        place += cut
    pieces.append(text.finish())
    assert "".join(pieces) == TOKENIZER.decode(ids)


@given(st.text(alphabet="aé 你好🎉\n\u0301\u200d", max_size=30))
def test_no_character_is_shown_before_it_is_whole(words):
    text, shown = TextStream(TOKENIZER), ""
    for token in TOKENIZER.encode(words, add_special_tokens=False).ids:
        shown += text.add([token])
        assert words.startswith(shown)
    assert shown + text.finish() == words


def test_characters_cut_between_tokens_are_in_the_test_above():
    ids = TOKENIZER.encode("🎉", add_special_tokens=False).ids
    assert len(ids) > 1 and TOKENIZER.decode(ids[:1]) == "\ufffd"


def test_special_tokens_are_not_shown_and_a_broken_end_is():
    text = TextStream(TOKENIZER)
    first_byte = TOKENIZER.encode("🎉", add_special_tokens=False).ids[0]
    assert text.add([0]) == "" and text.add([first_byte]) == "" and text.finish() == "\ufffd"


def test_a_text_may_not_steer_the_terminal():
    assert without_controls("a\x1b[2Jb\tc\nd\x07\x9b") == "a\ufffd[2Jb\tc\nd\ufffd\ufffd"


# ---- what is printed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", ["0", "0.9"])
def test_it_prints_the_prompt_and_what_the_model_writes(checkpoint, capsys, temperature):
    out, err = written(
        capsys, checkpoint, "--prompt", "def größe(", "--max-new-tokens", 12, "--temperature", temperature,
        "--top-p", "0.8", "--seed", 3,
    )  # fmt: skip
    model = DeepSeekV3.from_pretrained(checkpoint)
    ids = torch.tensor([TOKENIZER.encode("def größe(").ids])
    expected = model.generate(ids, 12, float(temperature), 0.8, generator=torch.Generator().manual_seed(3))
    assert out == "def größe(" + TOKENIZER.decode(expected[0, ids.shape[1] :].tolist()) + "\n"
    assert err.startswith(f"{expected.shape[1] - ids.shape[1]} tokens in ")


def test_speculation_prints_the_same_text_and_its_figures(checkpoint, capsys):
    same = (checkpoint, "--prompt", "import ", "--max-new-tokens", 12, "--temperature", 0)
    plain, _ = written(capsys, *same)
    for how in (("--draft-tokens", 2), ("--draft-tokens", "auto"), ("--drafter", "lookup"), ("--drafter", checkpoint)):
        drafted, figures = written(capsys, *same, "--speculative", *how)
        assert plain == drafted and "tokens a pass" in figures
        assert "drafts accepted" in figures or "lookup" in how  # which may find nothing
    assert "100% of" in figures  # a model that drafts for itself is always right


def test_top_k_of_one_is_greedy(checkpoint, capsys):
    same = (checkpoint, "--prompt", "import ", "--max-new-tokens", 8)
    assert written(capsys, *same, "--top-k", 1)[0] == written(capsys, *same, "--temperature", 0)[0]


def test_a_draft_model_with_another_tokenizer_is_refused(checkpoint, capsys, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "small")
    tokenizer = json.loads((tmp_path / "small/tokenizer.json").read_text())
    tokenizer["added_tokens"].pop()
    (tmp_path / "small/tokenizer.json").write_text(json.dumps(tokenizer))
    says = refused(capsys, checkpoint, "--speculative", "--drafter", tmp_path / "small")
    assert "--drafter: the tokenizer of" in says and "must share it" in says


def test_without_a_prompt_it_begins_a_text(checkpoint, capsys):
    assert encode_prompt(TOKENIZER, "", ModelConfig.preset("nano")).tolist() == [[0]]
    out, _ = written(capsys, checkpoint, "--max-new-tokens", 3)
    assert out.endswith("\n")


def test_a_prompt_may_spell_special_tokens(checkpoint):
    tokenizer = read_tokenizer(checkpoint)
    ids = encode_prompt(tokenizer, "<|fim_begin|>a<|fim_hole|>", ModelConfig.preset("nano"))[0].tolist()
    assert ids[:2] == [0, 3] and ids[-1] == 4


def test_letters_that_the_terminal_lacks_do_not_end_the_text(checkpoint, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.main(["generate", str(checkpoint), "--prompt", "größe", "--max-new-tokens", "2"]) == 0
    sys.stdout.flush()
    assert raw.getvalue().startswith(b"gr??e")


# ---- which model -----------------------------------------------------------------------------------------


def as_checkpoint(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_of_a_run_it_takes_the_finished_model_or_the_newest_save_point(tmp_path):
    run = tmp_path / "runs" / "tiny"
    as_checkpoint(run / "checkpoints" / "step-00000090")
    newest = as_checkpoint(run / "checkpoints" / "step-00000100")
    as_checkpoint(run / "checkpoints" / ".unfinished-step-00000110")
    assert find_checkpoint(run) == newest
    finished = as_checkpoint(run / "model")
    assert find_checkpoint(run) == finished
    assert find_checkpoint(newest) == newest


def test_without_a_folder_it_takes_the_run_that_saved_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="dsv3 train"):
        find_checkpoint(None)
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    old, new = (as_checkpoint(tmp_path / "runs" / name / "model") for name in "ab")
    os.utime(old, (1, 1))
    assert find_checkpoint(None).resolve() == new
    os.utime(new, (0, 0))
    assert find_checkpoint(None).resolve() == old


def test_folders_without_a_model_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no config.json.*it holds nothing"):
        find_checkpoint(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="it holds notes.txt"):
        find_checkpoint(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no save point yet.*dsv3 train --resume"):
        find_checkpoint(tmp_path)


def test_a_model_without_its_tokenizer_is_refused(checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "tokenizer.json").write_text('{"truncated": ')
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        read_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json: the model has no tokenizer" in refused(capsys, folder)


def test_a_tokenizer_of_another_model_is_refused():
    config = ModelConfig.preset("nano").replace(vocab_size=100)
    with pytest.raises(CheckpointError, match=f"has {VOCAB} tokens, the model's vocab_size is 100"):
        encode_prompt(TOKENIZER, "a", config)


def test_a_damaged_model_is_refused(checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:1000])
    assert "CheckpointError" in refused(capsys, folder)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == VOCAB


# ---- bad settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--max-new-tokens", "0"], "max_new_tokens: 0"),
        (["--max-new-tokens", "9999"], "max_position_embeddings"),
        (["--temperature", "-1"], "temperature: -1.0"),
        (["--temperature", "nan"], "temperature: nan"),
        (["--top-p", "2"], "top_p: 2.0"),
        (["--top-k", "0"], "top_k: 0"),
        (["--drafter", "lookup"], "--drafter: lookup given without --speculative"),
        (["--draft-tokens", "2"], "--draft-tokens: 2 given without --speculative"),
        (["--speculative", "--draft-tokens", "0"], "draft_tokens: 0"),
        (["--seed", str(2**64)], "--seed"),
        (["--device", "abacus"], "--device: 'abacus'"),
        (["--prompt", "a\udc80"], "--prompt"),
    ],
)
def test_bad_settings_are_refused_in_one_line(checkpoint, capsys, argv, words):
    assert words in refused(capsys, checkpoint, *argv)


def test_an_empty_prompt_for_a_model_that_knows_no_beginning():
    bare = default_tokenizer().backend
    bare.post_processor = None
    with pytest.raises(InputError, match="--prompt: is empty"):
        encode_prompt(bare, "", ModelConfig.preset("nano").replace(bos_token_id=None))


# ---- stopping it -----------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_line_and_the_process_cleanly(checkpoint):
    process = subprocess.Popen(
        [sys.executable, "-m", "dsv3lib.cli", "generate", str(checkpoint), "--prompt", "from ",
         "--max-new-tokens", "2000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUTF8": "1"},
    )  # fmt: skip
    begun = process.stdout.read(20)  # it writes as it goes: the prompt and some of the text are here already
    assert begun.startswith(b"from ") and process.poll() is None
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == cli.EXIT_INTERRUPTED
    assert rest.endswith(b"\n") and b"Traceback" not in errors and b"Stopped by Ctrl-C" in errors
