"""The whole model: V3's counts on the meta device, dtypes, initialisation, loss, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from strategies import SEEDS, build, configs, small, tokens, unchecked

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig, ModelOutput
from dsv3lib.checkpoint import copies, entries
from dsv3lib.errors import CacheError, ContextLengthError, Dsv3Error, InputError

BILLION = 1e9


# ---- V3 on the meta device --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v3() -> DeepSeekV3:
    with torch.device("meta"):
        return DeepSeekV3(ModelConfig.preset("v3-671b"))


def test_v3_s_counts_are_the_published_ones(v3: DeepSeekV3) -> None:
    counts = v3.parameter_counts()
    assert counts["main"] / BILLION == pytest.approx(671.03, abs=0.005)
    assert counts["active"] / BILLION == pytest.approx(36.63, abs=0.005)
    assert (counts["active"] + counts["embedding"]) / BILLION == pytest.approx(37.55, abs=0.005)
    assert counts["mtp"] / BILLION == pytest.approx(11.61, abs=0.005)
    projection = v3.model.layers[-1].eh_proj.weight.numel()
    assert (counts["mtp"] - projection) / BILLION == pytest.approx(11.51, abs=0.005)


def test_the_parts_are_the_whole(v3: DeepSeekV3) -> None:
    counts = v3.parameter_counts()
    biases = sum(r.e_score_correction_bias.numel() for r in v3.routers())
    assert counts["main"] + counts["mtp"] == sum(p.numel() for p in v3.parameters()) + biases
    parts = set(counts) - {"main", "active", "mtp"}
    assert sum(counts[part] for part in parts) == counts["main"]
    assert counts["embedding"] == counts["head"] == 129280 * 7168


def test_the_files_of_v3_hold_684_49_billion(v3: DeepSeekV3) -> None:
    """The main model, the MTP module, and its stored copies of embedding and head, as they would be saved."""
    state = v3.state_dict()
    stored = 0
    for entry in [*entries(v3), *copies(v3.config)]:
        stored += state[entry.target][entry.at].numel()
    assert stored / BILLION == pytest.approx(684.49, abs=0.005)
    counts = v3.parameter_counts()
    assert stored == counts["main"] + counts["mtp"] + 2 * counts["embedding"]


def test_v3_s_tensors_bear_the_released_names_and_shapes(v3: DeepSeekV3) -> None:
    shapes, state = {}, v3.state_dict()
    for entry in [*entries(v3), *copies(v3.config)]:
        if not any(f".experts.{j}." in entry.name for j in range(1, 255)):
            shapes[entry.name] = tuple(state[entry.target][entry.at].shape)
    layer = "model.layers.60."
    assert shapes[layer + "self_attn.q_a_proj.weight"] == (1536, 7168)
    assert shapes[layer + "self_attn.q_b_proj.weight"] == (128 * 192, 1536)
    assert shapes[layer + "self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes[layer + "self_attn.kv_b_proj.weight"] == (128 * 256, 512)
    assert shapes[layer + "self_attn.o_proj.weight"] == (7168, 128 * 128)
    assert shapes[layer + "self_attn.q_a_layernorm.weight"] == (1536,)
    assert shapes[layer + "self_attn.kv_a_layernorm.weight"] == (512,)
    assert shapes[layer + "mlp.gate.weight"] == (256, 7168)
    assert shapes[layer + "mlp.gate.e_score_correction_bias"] == (256,)
    assert shapes[layer + "mlp.experts.255.gate_proj.weight"] == (2048, 7168)
    assert shapes[layer + "mlp.experts.0.up_proj.weight"] == (2048, 7168)
    assert shapes[layer + "mlp.experts.0.down_proj.weight"] == (7168, 2048)
    assert shapes[layer + "mlp.shared_experts.down_proj.weight"] == (7168, 2048)
    assert shapes["model.layers.2.mlp.gate_proj.weight"] == (18432, 7168)
    assert "model.layers.2.mlp.gate.weight" not in shapes
    for name, shape in {
        "eh_proj.weight": (7168, 14336), "enorm.weight": (7168,), "hnorm.weight": (7168,),
        "shared_head.norm.weight": (7168,), "shared_head.head.weight": (129280, 7168),
        "embed_tokens.weight": (129280, 7168), "mlp.experts.255.up_proj.weight": (2048, 7168),
    }.items():  # fmt: skip
        assert shapes["model.layers.61." + name] == shape


@settings(max_examples=10)
@given(config=configs())
def test_active_parameters_are_those_one_token_meets(config: ModelConfig) -> None:
    """Counted by which weights a single token's logits depend on, embedding rows left aside."""
    if config.tie_word_embeddings or config.num_experts_per_tok == config.n_routed_experts:
        config = config.replace(tie_word_embeddings=False)
    model = build(config, dtype=torch.float64)
    out = model(tokens(config, 1, 1))
    main_layers = [i for i in out.expert_indices if i is not None]
    visited = sum(i.unique().numel() for i in main_layers)
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size
    all_experts = len(main_layers) * config.n_routed_experts
    counts = model.parameter_counts()
    assert counts["main"] - counts["active"] == counts["embedding"] + (all_experts - visited) * per_expert


# ---- initialisation ---------------------------------------------------------------------------------------


def test_the_same_generator_gives_the_same_model() -> None:
    def states(seed: int) -> list[torch.Tensor]:
        return list(DeepSeekV3(small(), torch.Generator().manual_seed(seed)).state_dict().values())

    assert all(map(torch.equal, states(3), states(3)))
    assert not all(map(torch.equal, states(3), states(4)))


@pytest.mark.parametrize("std", [0.006, 0.02])
def test_matrices_have_the_configured_spread_norms_are_one(std: float) -> None:
    model = DeepSeekV3(small(hidden_size=128, initializer_range=std, attention_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith(".bias"):
            assert not parameter.any(), name
        elif parameter.numel() > 1000:
            spread = std * (4 / parameter.numel() ** 0.5)
            assert abs(parameter.std().item() - std) < spread, name
            assert abs(parameter.mean().item()) < 2 * spread, name
    assert all(not r.e_score_correction_bias.any() for r in model.routers())


def test_a_fresh_model_knows_nothing() -> None:
    config = small(vocab_size=500, hidden_size=64)
    input_ids = tokens(config, 4, 32)
    loss = DeepSeekV3(config)(input_ids, labels=input_ids).losses["main"]
    assert loss.item() == pytest.approx(torch.tensor(500.0).log().item(), abs=0.1)


# ---- dtypes -----------------------------------------------------------------------------------------------


def test_bf16_runs_trains_and_stays_near_fp32() -> None:
    config = small(hidden_size=64, vocab_size=40)
    input_ids = tokens(config, 2, 12)
    exact = build(config, dtype=torch.float64)(input_ids).logits
    model = build(config, dtype=torch.bfloat16)
    out = model(input_ids, labels=input_ids)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert (out.logits.double() - exact).norm() / exact.norm() < 0.25  # a few tokens change an expert
    with torch.no_grad():
        cache = LatentCache(config)
        model(input_ids[:, :11], cache=cache)
        last = model(input_ids[:, 11:], cache=cache).logits
    assert last.dtype == torch.bfloat16
    assert (last[:, 0] - out.logits[:, -1]).float().norm() / out.logits[:, -1].float().norm() < 0.25
    assert cache.nbytes == 2 * 12 * 2 * config.latent_dim * 2


def test_fp64_runs_whole() -> None:
    config = small()
    model = build(config, dtype=torch.float64)
    out = model(tokens(config, 1, 6), labels=tokens(config, 1, 6))
    assert out.logits.dtype == out.loss.dtype == torch.float64
    fp32 = build(config)(tokens(config, 1, 6)).logits
    assert (out.logits - fp32).abs().max() < 1e-4


# ---- logits and loss --------------------------------------------------------------------------------------


def test_the_main_loss_is_the_usual_cross_entropy() -> None:
    config = small()
    model = build(config)
    input_ids = tokens(config, 3, 9)
    out = model(input_ids, labels=input_ids)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    torch.testing.assert_close(out.losses["main"], expected)
    assert torch.equal(out.logits, model(input_ids).logits)
    assert model(input_ids).loss is None and model(input_ids).losses == {}


def test_ignored_labels_are_no_targets() -> None:
    config = small(num_nextn_predict_layers=0)
    model = build(config)
    input_ids = tokens(config, 1, 9)
    labels = input_ids.clone()
    labels[:, :5] = -100
    out = model(input_ids, labels=labels)
    expected = F.cross_entropy(out.logits[0, 4:-1], input_ids[0, 5:])
    torch.testing.assert_close(out.losses["main"], expected)
    nothing = model(input_ids, labels=torch.full_like(input_ids, -100)).losses["main"]
    assert nothing.item() == 0.0


def short_beside_long(model: DeepSeekV3) -> tuple[torch.Tensor, ModelOutput, list[ModelOutput]]:
    """Two rows of which one ends early; the model's output for both together, and for each alone, cut to its length."""
    ids, lengths = tokens(model.config, 2, 9), torch.tensor([9, 5])
    rows = [ids[b : b + 1, :n] for b, n in enumerate(lengths.tolist())]
    return ids, model(ids, labels=ids, lengths=lengths), [model(row, labels=row) for row in rows]


def test_padding_is_no_target_and_changes_nothing() -> None:
    """A short row beside a long one gives the logits, and the targets, that it gives alone."""
    _, out, alone = short_beside_long(build(small(aux_loss_alpha=0.0), dtype=torch.float64))
    torch.testing.assert_close(out.logits[1, :5], alone[1].logits[0], rtol=0, atol=1e-12)
    for name, targets in (("main", (8, 4)), ("mtp_1", (7, 3))):
        mean = sum(a.losses[name] * n for a, n in zip(alone, targets, strict=True)) / sum(targets)
        torch.testing.assert_close(out.losses[name], mean, rtol=0, atol=1e-12)


def test_padding_is_not_counted_and_not_balanced() -> None:
    """Loads and balance loss of a row that ends early are those of the row cut short, in the MTP module too."""
    model = build(small(aux_loss_alpha=0.3), dtype=torch.float64)
    input_ids, out, alone = short_beside_long(model)
    assert torch.equal(out.expert_load, alone[0].expert_load + alone[1].expert_load)
    mean = (alone[0].losses["balance"] + alone[1].losses["balance"]) / 2
    torch.testing.assert_close(out.losses["balance"], mean, rtol=0, atol=1e-12)
    padded = model(input_ids, labels=input_ids)
    assert not torch.equal(padded.expert_load, out.expert_load)
    assert abs(padded.losses["balance"] - mean) > 1e-6, "with the padding in it, it would be another"


def test_documents_shut_targets_but_not_attention() -> None:
    config = small()
    model = build(config, dtype=torch.float64)
    input_ids = tokens(config, 1, 8)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    packed, plain = (
        model(input_ids, labels=input_ids, document_ids=documents),
        model(input_ids, labels=input_ids),
    )
    assert torch.equal(packed.logits, plain.logits)
    kept = [0, 1, 2, 4, 5, 6]
    expected = F.cross_entropy(packed.logits[0, kept], input_ids[0, [i + 1 for i in kept]])
    torch.testing.assert_close(packed.losses["main"], expected)
    assert packed.losses["mtp_1"] != plain.losses["mtp_1"]


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    config = small()
    model = build(config, dtype=torch.float64)
    input_ids = tokens(config, 3, 7)
    whole = model(input_ids, return_mtp=True)
    for b in range(3):
        alone = model(input_ids[b : b + 1], return_mtp=True)
        torch.testing.assert_close(whole.logits[b], alone.logits[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(whole.mtp_logits[0][b], alone.mtp_logits[0][0], rtol=0, atol=1e-12)


@settings(max_examples=8)
@given(config=configs(mtp=(0, 1), max_layers=2), seed=SEEDS)
def test_the_loss_s_slope_is_its_gradient(config: ModelConfig, seed: int) -> None:
    """Finite differences along a random direction through every parameter at once, in fp64."""
    model = build(config, seed, torch.float64)
    input_ids = tokens(config, 2, 6, seed)
    generator = torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]

    def loss() -> torch.Tensor:
        return model(input_ids, labels=input_ids).loss

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    values = []
    with torch.no_grad():
        chosen = model(input_ids, return_mtp=True).expert_indices
        for step in (1e-6, -2e-6):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=step)
            values.append(loss())
            moved = model(input_ids, return_mtp=True).expert_indices
            # Where a token changes its experts, the loss jumps.
            assume(all(torch.equal(a, b) for a, b in zip(chosen, moved, strict=True)))
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope, rtol=1e-5, atol=1e-5)


def test_a_copy_is_a_model_of_its_own() -> None:
    config = small()
    model = build(config)
    twin = copy.deepcopy(model)
    input_ids = tokens(config, 1, 5)
    before = twin(input_ids).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(input_ids).logits, before)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(model(input_ids).logits, before)


# ---- bad input --------------------------------------------------------------------------------------------

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
BAD = {
    "an id past the vocabulary": (dict(input_ids=torch.tensor([[1, 50]])), InputError, r"input_ids.*50.*\[0, 50\)"),
    "a negative id": (dict(input_ids=torch.tensor([[1, -7]])), InputError, "input_ids.*-7"),
    "floats": (dict(input_ids=torch.ones(1, 3)), InputError, "input_ids.*float32"),
    "booleans": (dict(input_ids=torch.ones(1, 3, dtype=torch.bool)), InputError, "input_ids.*bool"),
    "one dimension": (dict(input_ids=torch.tensor([1, 2])), InputError, r"input_ids.*\(2,\)"),
    "no tokens": (dict(input_ids=torch.zeros(2, 0, dtype=torch.int64)), InputError, r"input_ids.*\(2, 0\)"),
    "no rows": (dict(input_ids=torch.zeros(0, 2, dtype=torch.int64)), InputError, r"input_ids.*\(0, 2\)"),
    "too long": (dict(input_ids=torch.zeros(1, 65, dtype=torch.int64)), ContextLengthError, "65.*64"),
    "labels of another shape": (dict(input_ids=IDS, labels=IDS[:, :2]), InputError, r"labels.*\(2, 2\)"),
    "labels out of range": (dict(input_ids=IDS, labels=IDS + 47), InputError, r"labels.*50"),
    "negative labels": (dict(input_ids=IDS, labels=IDS - 5), InputError, r"labels.*-4"),
    "labels in floats": (dict(input_ids=IDS, labels=IDS.float()), InputError, "labels.*float32"),
    "documents of another shape": (
        dict(input_ids=IDS, labels=IDS, document_ids=IDS[:1]), InputError, r"document_ids.*\(1, 3\)"),
    "too few lengths": (dict(input_ids=IDS, lengths=torch.tensor([3])), InputError, r"lengths.*\(1,\)"),
    "a length past the row": (dict(input_ids=IDS, lengths=torch.tensor([3, 4])), InputError, r"lengths.*\[3, 4\]"),
    "a negative length": (dict(input_ids=IDS, lengths=torch.tensor([-1, 3])), InputError, r"lengths.*-1"),
    "lengths in floats": (dict(input_ids=IDS, lengths=torch.tensor([1.0, 3.0])), InputError, "lengths.*float"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case: str) -> None:
    arguments, error, says = BAD[case]
    model = build(small())
    with unchecked(), pytest.raises(error, match=says) as caught:
        model(**arguments)
    assert isinstance(caught.value, Dsv3Error) and isinstance(caught.value, ValueError)


def test_a_loss_beside_a_cache_is_refused() -> None:
    model = build(small())
    with pytest.raises(InputError, match="labels"):
        model(IDS, labels=IDS, cache=LatentCache(model.config))


def test_a_refused_call_leaves_the_cache_as_it_was() -> None:
    model = build(small())
    cache = LatentCache(model.config)
    with torch.no_grad():
        model(IDS, cache=cache)
        for bad in (IDS[:1], IDS + 45, torch.zeros(2, 62, dtype=torch.int64)):
            with pytest.raises((CacheError, InputError)):
                model(bad, cache=cache)
        assert cache.lengths.tolist() == [3, 3]
        again = model(IDS, cache=cache).logits
        torch.testing.assert_close(again, model(torch.cat([IDS, IDS], 1)).logits[:, 3:])


def test_what_is_accepted_at_the_edges() -> None:
    """Else the refusals above would prove little."""
    model = build(small())
    model(torch.tensor([[0, 49]]))
    model(torch.zeros(1, 64, dtype=torch.int64))
    model(IDS.int(), labels=IDS.int())
    model(IDS, lengths=torch.tensor([0, 3]))
    model(IDS, labels=torch.where(IDS > 3, -100, IDS))


def test_the_chain_cannot_go_on_from_a_cache():
    model = DeepSeekV3(ModelConfig.preset("nano"))
    with pytest.raises(InputError, match="return_mtp"):
        model(torch.zeros(1, 4, dtype=torch.int64), cache=LatentCache(model.config), return_mtp=True)
