"""Two streams in a pair: bounds that any schedule of kernels keeps, and the share of SMs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import unchecked

from dsv3lib import ModelConfig
from dsv3lib.errors import ConfigError
from dsv3lib.pipeline.overlap import Gpu, LayerTimes, simulate_pair, tune

TIME = st.floats(0, 8, allow_nan=False)


@given(a=TIME, d=TIME, m=TIME, c=TIME, layers=st.integers(1, 4), sms=st.integers(1, 131))
def test_no_stream_does_two_things_and_nothing_starts_before_its_input(a, d, m, c, layers, sms):
    gpu = Gpu(communication_sms=sms)
    pair = simulate_pair(LayerTimes(a, d, m, c), gpu, layers)
    for stream in ("compute", "communication"):
        row = [kernel for kernel in pair.kernels if kernel.stream == stream]
        assert all(one.end <= other.start for one, other in zip(row, row[1:], strict=False))
    end = {(k.of, k.name, k.layer): k.end for k in pair.kernels}
    start = {(k.of, k.name, k.layer): k.start for k in pair.kernels}
    for i in range(layers):
        forward = ["attention", "dispatch", "mlp", "combine"]
        backward = ["combine", "mlp inputs", "dispatch", "attention inputs"]
        for of, names in (("F", forward), ("B", backward)):
            assert all(end[of, x, i] <= start[of, y, i] for x, y in zip(names, names[1:], strict=False))
    assert len(pair.kernels) == 10 * layers
    longest = max(pair.busy("compute"), pair.busy("communication"))
    assert longest - 1e-9 <= pair.makespan <= pair.busy("compute") + pair.busy("communication") + 1e-9
    assert -1e-9 <= pair.hidden <= 1 + 1e-9


def test_nothing_to_send_is_hidden_and_costs_the_sms():
    pair = simulate_pair(LayerTimes(1, 0, 2, 0), layers=3)
    assert pair.hidden == 1 and pair.makespan == pytest.approx(3 * 9 * 132 / 112)


def test_little_communication_hides_almost_whole_and_much_cannot():
    v3 = ModelConfig.preset("v3-671b")
    hidden = [simulate_pair(LayerTimes.of_model(v3, ratio), layers=30).hidden for ratio in (0.5, 1.0, 2.0)]
    assert hidden[0] > 0.99 > hidden[1] > hidden[2]


def test_of_model_keeps_the_ratio_and_the_models_own_split():
    v3 = ModelConfig.preset("v3-671b")
    times = LayerTimes.of_model(v3, 0.8)
    assert 2 * (times.dispatch + times.combine) == pytest.approx(0.8 * 3 * (times.attention + times.mlp))
    assert times.attention + times.mlp == pytest.approx(1)
    assert times.combine / times.dispatch == pytest.approx(2 / (1 + 4 / 128))


def test_tuning_finds_the_shortest_and_few_sms_are_slow():
    times = LayerTimes.of_model(ModelConfig.preset("v3-671b"), 0.3)
    best, found = tune(times)
    assert len(found) == 131 and found[best] == min(found.values())
    assert best < 20 and found[1] > found[best] < found[100]


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: LayerTimes(attention=-1), "attention: -1"),
        (lambda: LayerTimes(combine=float("nan")), "combine: nan"),
        (lambda: Gpu(communication_sms=132), "fewer than the 132"),
        (lambda: Gpu(communication_sms=0), "communication_sms: 0"),
        (lambda: simulate_pair(LayerTimes(), layers=0), "layers: 0"),
    ],
)
def test_what_makes_no_sense(make, word):
    with unchecked(), pytest.raises(ConfigError, match=word):
        make()
