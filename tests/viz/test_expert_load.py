"""The history behind the expert-load view, what is packed for the page, and its still and kernel-less forms."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.errors import InputError, SaveError, TrainingError
from dsv3lib.training.loop.balance import max_violation
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.loop.trainer import Trainer
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.domains import builtin_domains
from dsv3lib.training.text.tokenizer import default_tokenizer
from dsv3lib.viz import load_history
from dsv3lib.viz.expert_load import ExpertLoad
from dsv3lib.viz.load_history import LoadHistory

SIZE = ModelConfig.preset("nano").replace(num_hidden_layers=2, hidden_size=32)
DOMAINS = ("docs", "arithmetic")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of five steps: its folder, its records, and the trained model."""
    folder = tmp_path_factory.mktemp("runs") / "five"
    stream = PackedStream(builtin_domains(DOMAINS), default_tokenizer(), 32)
    model = DeepSeekV3(SIZE, torch.Generator().manual_seed(0))
    settings = TrainingConfig(steps=5, batch_size=4, validation_batches=0, bias_speed=0.013)
    return folder, list(Trainer(model, stream, settings, out=folder)), model


def unpack(packet):
    length = int.from_bytes(packet[:4], "little")
    header = json.loads(packet[4 : 4 + length])
    arrays = {}
    for entry in header["arrays"]:
        assert entry["offset"] % 4 == 0
        at = 4 + length + entry["offset"]
        arrays[entry["name"]] = np.frombuffer(packet, entry["dtype"], entry["count"], at)
    return header, arrays


def made_up(steps, layers=2, experts=4, groups=2, domains=("a", "b"), largest=9, seed=0, speed=0.01, ranks=0):
    draw, history = (
        np.random.default_rng(seed),
        LoadHistory([f"layer {i}" for i in range(layers)], experts, groups, domains),
    )
    for step in range(1, steps + 1):
        parts = {d: draw.integers(0, largest + 1, (layers, experts)) for d in domains}
        total = sum(parts.values()) if parts else draw.integers(0, largest + 1, (layers, experts))
        record = {"step": step, "expert_load": total, "domain_load": parts, "bias_speed": speed}
        if ranks:
            shares = draw.integers(0, ranks, total.shape)  # who has computed all of it
            record["rank_load"] = [
                {str(layer): (total * (shares == rank))[layer].tolist() for layer in range(layers)}
                for rank in range(ranks)
            ]
        history.add(record)
    return history


def test_a_run_read_from_its_log_is_the_run_that_was_watched(run):
    folder, records, model = run
    live = ExpertLoad.of_model(SIZE, DOMAINS)
    for record in records:
        live.add(record)
    read = ExpertLoad.of_run(folder).history
    for history in (live.history, read):
        assert history.steps == [1, 2, 3, 4, 5] and history.layers == ["layer 1", "MTP 1"]
        assert history.load.tolist() == [r["expert_load"] for r in records]
        assert (history.by_domain.sum(1) == history.load).all()
        expected = max_violation(torch.from_numpy(history.load))
        np.testing.assert_allclose(history.violation, expected.numpy())
    assert read.packet("x") == live.history.packet("x")


def test_the_bias_is_replayed_to_the_bit_from_speed_and_loads(run):
    _, records, model = run
    history = LoadHistory.of_model(SIZE, DOMAINS)
    for record in records:
        history.add(record)
    real = torch.stack([router.e_score_correction_bias for router in model.routers()])
    assert real.abs().max() > 0
    assert np.array_equal(history.bias[-1], real.numpy())


@given(st.integers(1, 40), st.integers(1, 7), st.sampled_from([3, 300, 70_000]))
def test_thinning_sums_steps_and_loses_no_token(steps, most, largest):
    history = made_up(steps, largest=largest, ranks=3)
    before = load_history.MAX_FRAMES
    load_history.MAX_FRAMES = most
    try:
        header, arrays = unpack(history.packet())
    finally:
        load_history.MAX_FRAMES = before
    frames = len(header["last"])
    assert frames == min(steps, most)
    load = arrays["load"].reshape(frames, 2, 4).astype(np.int64)
    domain = arrays["domain"].reshape(frames, 2, 2, 4).astype(np.int64)
    assert (load.sum(0) == history.load.sum(0)).all() and (domain.sum(1) == load).all()
    rank = arrays["rank"].reshape(frames, 3, 2, 4).astype(np.int64)
    assert (rank.sum(1) == load).all() and (rank.sum(0) == history.by_rank.sum(0)).all()
    assert header["first"][0] == 1 and header["last"][-1] == steps
    assert all(b == a + 1 for a, b in zip(header["last"], header["first"][1:], strict=False))
    assert len(arrays["violation"]) == 2 * steps, "curves keep every step"


def test_a_packet_of_v3s_size_stays_within_bounds(monkeypatch):
    monkeypatch.setattr(load_history, "MAX_BYTES", 200_000)
    history = made_up(20, layers=58, experts=256, groups=8, domains=())
    header, arrays = unpack(history.packet())
    assert arrays["load"].nbytes <= 200_000 and 1 < len(header["last"]) < 20
    assert arrays["colours"].reshape(-1, 3)[128].min() > 240, "the mean is white"


def test_an_empty_view_can_be_shown(monkeypatch):
    view = ExpertLoad.of_model(SIZE)
    data, _ = view._repr_mimebundle_()
    assert "nothing to see yet" in data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data
    assert "No step has been recorded" in view.page()
    with pytest.raises(InputError, match="nothing has been recorded"):
        view.figure()


def test_the_widget_gets_new_steps_and_is_not_flooded(run):
    _, records, _ = run
    view = ExpertLoad.of_model(SIZE, DOMAINS)
    widget = view.widget()
    assert view.widget() is widget
    packets = []
    widget.observe(lambda change: packets.append(change["new"]), names="packet")
    for record in records:
        view.add(record)
    assert len(packets) < len(records), "five steps in a moment are not five drawings"
    assert view.refresh(now=True)
    assert unpack(widget.packet)[0]["steps"] == [1, 2, 3, 4, 5]


def test_the_still_picture_has_all_panels_and_words(run):
    view = ExpertLoad.of_run(run[0])
    figure, alt = view.figure(step=3, layer=1, domain="docs")
    labels = {ax.get_ylabel() for ax in figure.axes}
    assert {"MaxVio (max / mean − 1)", "bias (added to the affinity)"} <= labels
    assert "2 layers by 8 experts" in alt
    data, _ = view._repr_mimebundle_()
    assert 'src="data:image/png;base64,' in data["text/html"] and 'alt="' in data["text/html"]
    nodes, _ = ExpertLoad(made_up(3, domains=())).figure()
    assert any("node" in ax.get_xlabel() for ax in nodes.axes)
    still = ExpertLoad(made_up(3, speed=0.0))  # a bias that stands still gets no empty chart
    assert not any("bias" in ax.get_ylabel() for ax in still.figure()[0].axes)
    for wrong, name in (
        ({"step": 9}, "step: 9"),
        ({"layer": 2}, "layer: 2"),
        ({"domain": "x"}, "domain: 'x'"),
    ):
        with pytest.raises(InputError, match=name):
            view.figure(**wrong)


def test_ranks_are_kept_apart_by_the_layers_that_each_computed():
    history, load = LoadHistory.of_model(SIZE), np.full((2, 8), 6)  # layer 1, and layer 2: the MTP module
    first, second = [[4] * 7 + [2], [2] * 7 + [4]], [[5] + [6] * 7]
    history.add({"step": 1, "expert_load": load, "rank_load": [{"1": first[0]}, {"1": first[1], "2": second[0]}]})
    history.add({"step": 2, "expert_load": load})  # gone on with by one process
    history.add({"step": 3, "expert_load": load, "rank_load": [{}, {"2": second[0]}, {"1": first[0]}]})
    nothing = [0] * 8
    assert history.ranks == 3 and history.layers == ["layer 1", "MTP 1"]
    assert history.by_rank.tolist() == [
        [[first[0], nothing], [first[1], second[0]], [nothing, nothing]],
        [[nothing, nothing]] * 3,
        [[nothing, nothing], [nothing, second[0]], [first[0], nothing]],
    ]
    header, arrays = unpack(history.packet())
    assert header["ranks"] == 3 and arrays["rank"].tolist() == history.by_rank.flatten().tolist()
    view = ExpertLoad(history)
    figure, alt = view.figure(step=1, rank=1)
    assert "rank 1" in figure.get_suptitle() and "Five panels" in alt and "all 3 ranks beside each rank's" in alt
    shown, compared = (ax.images[0].get_array() for ax in (figure.axes[0], figure.axes[4]))
    ratios = np.array(first[1]) / np.mean(first[1])
    np.testing.assert_allclose(shown[0], np.log2(ratios))
    np.testing.assert_allclose(compared[2], np.log2(ratios))  # below all ranks and rank 0
    assert compared[3].mask.all() and not compared[0].mask.any()
    names = [label.get_text() for label in figure.axes[4].get_yticklabels()]
    assert names == ["all ranks", "rank 0", "rank 1", "rank 2"]
    for wrong in ({"rank": 3}, {"rank": -1}, {"rank": 0, "domain": "docs"}):
        with pytest.raises(InputError, match="rank: |domain: "):
            view.figure(**wrong)
    for loads, named in (({"3": nothing}, "has layer 3, expected one of 1, 2"), ({"1": [1]}, "rank_load of rank 1")):
        with pytest.raises(TrainingError, match=named):
            history.add({"step": 4, "expert_load": load, "rank_load": [{}, loads]})
    assert len(history) == 3


def test_the_page_holds_everything_itself(run, tmp_path):
    view = ExpertLoad.of_run(run[0], title="<run & co>")
    text = view.save_page(tmp_path / "load.html").read_text()
    assert "&lt;run &amp; co&gt;" in text and "http" not in text.replace("http-equiv", "")
    packet = base64.b64decode(re.search(r'const text = "([^"]+)"', text).group(1))
    assert packet == view.history.packet(view.title)
    with pytest.raises(SaveError, match="cannot be written"):
        view.save_page(tmp_path / "load.html" / "a file is no folder.html")


def test_a_log_from_another_config_is_refused(run):
    history = LoadHistory.of_model(SIZE.replace(n_routed_experts=16), DOMAINS)
    with pytest.raises(
        TrainingError, match=r"step 1: expert_load has shape \(2, 8\).*expected.*\(2, 16\).*another model"
    ):
        history.add(run[1][0])
    with pytest.raises(TrainingError, match="domain_load has docs, arithmetic, expected code"):
        LoadHistory.of_model(SIZE, ["code"]).add(run[1][0])
    history = LoadHistory.of_model(SIZE, DOMAINS)
    with pytest.raises(TrainingError, match="float64"):
        history.add({"step": 1, "expert_load": [[0.5] * 8] * 2})
    with pytest.raises(TrainingError, match="expert_load has shape"):
        history.add({"step": 1, "expert_load": [[1, 2], [3]]})
    history.add(run[1][1])
    with pytest.raises(TrainingError, match="step 1: comes after step 2"):
        history.add(run[1][0])
    assert len(history) == 1
    with pytest.raises(TrainingError, match="header: describes no mixture"):
        LoadHistory.of_header({"kind": "header", "model": {"hidden_size": 3}})
    with pytest.raises(InputError, match="groups that divide"):
        LoadHistory(["layer 1"], 8, 3)
