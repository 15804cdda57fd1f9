"""Custom autograd functions: a second derivative is refused, never wrong in silence."""

import ast
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from strategies import build, small, tokens

from dsv3lib.backends.cpu_norm import _RMSNorm
from dsv3lib.layers.norm import RMSNorm

SOURCES = sorted(Path(str(files("dsv3lib"))).rglob("*.py"))


def backward_functions() -> list[tuple[str, ast.FunctionDef]]:
    """Every ``backward`` of a subclass of torch.autograd.Function, with its place."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(
                "autograd.Function" in ast.unparse(b) for b in node.bases
            ):
                found += [(f"{path.name}: {node.name}", f) for f in node.body
                          if isinstance(f, ast.FunctionDef) and f.name == "backward"]  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("place", "function"), backward_functions(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_each_backward_is_marked(place: str, function: ast.FunctionDef) -> None:
    assert any("once_differentiable" in ast.unparse(d) for d in function.decorator_list), place


def test_there_are_functions_to_look_at() -> None:
    assert len(backward_functions()) >= 10


def test_the_plain_norm_differentiated_once_more_is_right() -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(RMSNorm(6, 1e-6).double(), x)


def test_the_norm_with_a_backward_of_its_own_refuses() -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    y = _RMSNorm.apply(x, torch.ones(6, dtype=torch.float64), 1e-6)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.pow(2).sum().backward()


def test_a_whole_model_s_too() -> None:
    model = build(small(), dtype=torch.float64)
    ids = tokens(model.config, 1, 6)
    weight = model.model.layers[1].mlp.experts.down_proj
    (grad,) = torch.autograd.grad(model(ids, labels=ids).loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.pow(2).sum().backward()
