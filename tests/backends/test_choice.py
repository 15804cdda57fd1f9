"""Who computes: what ``explain`` says is what runs, and a module that was touched runs as it is."""

import ast
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from strategies import build, small, tokens
from torch import nn

import dsv3lib
from dsv3lib import DeepSeekV3
from dsv3lib.backends import cpu, few_tokens
from dsv3lib.layers.norm import RMSNorm
from dsv3lib.linear import PlainRecipe

LAYERS = Path(dsv3lib.__file__).parent / "layers"


def model_of(**changes) -> DeepSeekV3:
    return build(small(num_nextn_predict_layers=0, **changes)).eval()


def backends_of(model: DeepSeekV3, operation: str) -> Counter:
    """How many modules of an operation each backend computes, as the table has it."""
    lines = [line for line in model.explain().lines if line.operation == operation]
    return Counter({line.backend: len(line.modules) for line in lines})


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """Counts the CPU's fast forms and the modules' own forward, where the layers meet them."""
    counts: Counter = Counter()

    def counted(name, function):
        return lambda *args, **named: (counts.update([name]), function(*args, **named))[1]

    monkeypatch.setattr(cpu, "rms_norm", counted("fast norm", cpu.rms_norm))
    monkeypatch.setattr(cpu, "experts_one_by_one", counted("fast experts", cpu.experts_one_by_one))
    monkeypatch.setattr(few_tokens.FewTokens, "forward", counted("few tokens", few_tokens.FewTokens.forward))
    monkeypatch.setattr(F, "rms_norm", counted("plain norm", F.rms_norm))
    return counts


def test_a_hook_changes_the_table_and_the_calls(calls) -> None:
    model = model_of()
    ids = tokens(model.config, 1, 6)
    model(ids)
    assert backends_of(model, "RMSNorm") == {"cpu": calls["fast norm"]} and not calls["plain norm"]
    assert backends_of(model, "routed experts") == {"cpu": calls["fast experts"]} == {"cpu": 1}
    before = calls["fast norm"]
    calls.clear()

    hook = model.model.layers[1].input_layernorm.register_forward_hook(lambda *_: None)
    model(ids)
    assert backends_of(model, "RMSNorm") == {"cpu": calls["fast norm"], "plain": calls["plain norm"]}
    assert (calls["fast norm"], calls["plain norm"]) == (before - 1, 1)
    touched = [line for line in model.explain().lines if line.operation == "RMSNorm" and line.backend == "plain"]
    assert touched[0].modules == ("model.layers.1.input_layernorm",) and touched[0].why == "has a forward hook"
    assert "model.layers.1.input_layernorm" in str(model.explain())
    assert "has a forward hook" in model.explain()._repr_html_()

    hook.remove()
    calls.clear()
    model(ids)
    assert backends_of(model, "RMSNorm") == {"cpu": before} == {"cpu": calls["fast norm"]}


def test_the_few_token_engine_steps_aside_and_comes_back(calls) -> None:
    model = model_of()
    ids = tokens(model.config, 1, 6)
    model.generate(ids, 4, stop_tokens=())
    assert calls["few tokens"] == 4 and model.explain().lines[0].backend == "cpu"
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    calls.clear()
    model.generate(ids, 4, stop_tokens=())
    assert not calls["few tokens"]
    line = model.explain().lines[0]
    assert line.backend == "plain" and "layers.0.mlp: its down_proj has a forward hook" in line.why
    hook.remove()
    model.generate(ids, 4, stop_tokens=())
    assert calls["few tokens"] == 4


CHANGES = {
    "RMSNorm of torch": ("model.layers.0.input_layernorm", lambda old: nn.RMSNorm(24, eps=0.1)),
    "no norm": ("model.norm", lambda old: nn.Identity()),
    "LayerNorm of a latent": ("model.layers.1.self_attn.kv_a_layernorm", lambda old: nn.LayerNorm(12)),
    "a network that gives no routing": ("model.layers.1.mlp", lambda old: nn.Sequential(nn.Linear(24, 24), nn.Tanh())),
    "a subclass of RMSNorm": ("model.layers.1.post_attention_layernorm", lambda old: Halved(24, 1e-6)),
    "an attention of one's own": ("model.layers.0.self_attn", lambda old: Mean()),
    "a block of one's own": ("model.layers.0", lambda old: Skip()),
}


class Halved(RMSNorm):
    def forward(self, x):
        return super().forward(x) / 2


class Mean(nn.Module):
    def forward(self, x, step):
        return x.flip(-1)


class Skip(nn.Module):
    def forward(self, x, step):
        return x + x.flip(-1), None


@pytest.mark.parametrize("name", CHANGES)
def test_a_replaced_module_runs_as_it_is(name: str) -> None:
    model = build(small(num_nextn_predict_layers=0), dtype=torch.float64)
    ids = tokens(model.config, 1, 5)
    before = model(ids).logits
    place, make = CHANGES[name]
    parent, _, child = place.rpartition(".")
    setattr(model.get_submodule(parent), child, make(model.get_submodule(place)).double())
    after = model(ids).logits
    assert not torch.allclose(before, after)
    assert any(line.backend == "plain" and place in line.modules for line in model.explain().lines)
    if "own" in name:
        return  # these keep no cache, so that there is nothing to decode from
    expected = ids
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, 5, stop_tokens=()), expected)


def test_a_setting_changed_at_one_module_is_seen() -> None:
    """The few-token engine reads the model's configuration; a norm with another ε is no longer what that says."""
    model = build(small(num_nextn_predict_layers=0), dtype=torch.float64)
    ids = tokens(model.config, 1, 8)
    model.generate(ids, 2, stop_tokens=())
    model.model.layers[1].input_layernorm.eps = 0.5
    assert "has eps 0.5" in model.explain().lines[0].why
    kept = model.model.layers[0].mlp
    kept.down_proj.bias = nn.Parameter(torch.ones(24, dtype=torch.float64))
    model.model.layers[1].input_layernorm.eps = model.config.rms_norm_eps
    assert "layers.0.mlp: its down_proj was given a bias" in model.explain().lines[0].why


def test_a_recipe_that_is_not_plain_sends_fast_forms_aside(calls) -> None:
    class Other(PlainRecipe):
        name, plain, absorbs = "other", False, False

    model = DeepSeekV3(small(), recipe=Other()).eval()
    model.generate(tokens(model.config, 1, 4), 3, stop_tokens=())
    assert not calls["few tokens"] and not calls["fast experts"] and calls["fast norm"]
    text = str(model.explain())
    assert "recipe other" in text and "made by the recipe 'other'" in text
    assert model.explain().short().startswith("cpu (a CPU, float32): RMSNorm")


def test_autocast_runs_the_plain_layers(calls) -> None:
    model = model_of()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        logits = model(tokens(model.config, 1, 6)).logits
        assert "autocast" in model.explain().machine.why
    assert torch.isfinite(logits).all() and not calls["fast norm"] and not calls["fast experts"]


def test_meta_and_half_precision_have_their_lines() -> None:
    with torch.device("meta"):
        model = DeepSeekV3(small())
    assert model.explain().machine.backend.name == "plain"
    assert backends_of(model_of().bfloat16(), "RMSNorm") == {"plain": 9}


def test_layers_import_no_kernel_and_no_backend() -> None:
    def imported(source: str) -> set[str]:
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom | ast.Import)]
        names = {a.name for n in nodes for a in n.names} | {getattr(n, "module", None) or "" for n in nodes}
        return {part for name in names for part in name.split(".")}

    forbidden = {"kernels", "backends", "model", "inference", "training"}
    assert imported("from ..kernels.moe import gate") & forbidden, "the check sees an import"
    for path in [*LAYERS.glob("*.py"), LAYERS.parent / "linear.py", LAYERS.parent / "recompute.py"]:
        if "DeprecationWarning" not in path.read_text(encoding="utf-8"):
            assert not imported(path.read_text(encoding="utf-8")) & forbidden, path.name
