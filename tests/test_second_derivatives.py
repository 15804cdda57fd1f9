"""Custom autograd functions: a second derivative is refused, never wrong in silence."""

import ast
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from strategies import build, small, tokens
from torch.autograd.function import once_differentiable as cut

from dsv3lib.backends.cpu_norm import _RMSNorm
from dsv3lib.errors import GradientError
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
    if place == "gemm.py: _Linear":  # made of products that have derivatives: tests/test_gemm.py
        return
    assert any(ast.unparse(d) == "once_differentiable" for d in function.decorator_list), place


def test_there_are_functions_to_look_at() -> None:
    assert len(backward_functions()) >= 10


def test_the_plain_norm_differentiated_once_more_is_right() -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(RMSNorm(6, 1e-6).double(), x)


def with_graph(y: torch.Tensor, of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y, of, create_graph=True)


def test_the_norm_with_a_backward_of_its_own_refuses() -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    y = _RMSNorm.apply(x, torch.ones(6, dtype=torch.float64), 1e-6)
    with pytest.raises(GradientError, match="_RMSNorm has a first derivative only.*create_graph"):
        with_graph(y.pow(2).sum(), x)


def test_a_second_way_to_the_input_does_not_hide_it() -> None:
    """torch's own mark says nothing here: the part through the norm is missing from the second derivative."""
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(6, dtype=torch.float64)
    (right,) = with_graph((RMSNorm(6, 1e-6).double()(x).pow(3).sum() + x.pow(3).sum()), x)
    (right,) = torch.autograd.grad(right.sum(), x)

    class OnlyCut(_RMSNorm):
        backward = staticmethod(cut(_RMSNorm.backward.__wrapped__))

    (half,) = with_graph(OnlyCut.apply(x, weight, 1e-6).pow(3).sum() + x.pow(3).sum(), x)
    (half,) = torch.autograd.grad(half.sum(), x)
    assert not torch.allclose(half, right)
    with pytest.raises(GradientError):
        with_graph(_RMSNorm.apply(x, weight, 1e-6).pow(3).sum() + x.pow(3).sum(), x)


def test_a_whole_model_s_too() -> None:
    model = build(small(), dtype=torch.float64)
    ids = tokens(model.config, 1, 6)
    with pytest.raises(GradientError):
        with_graph(model(ids, labels=ids).loss, model.model.layers[1].mlp.experts.down_proj)
