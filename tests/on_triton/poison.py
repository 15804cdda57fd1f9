"""Memory that nobody should read, and results that nobody wrote, filled with NaN."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it, fresh memory holds NaN (whole numbers: their largest), so that a hole in a result shows."""

    def wrap(make):
        return lambda *args, **kwargs: fill(make(*args, **kwargs))

    with (
        mock.patch.object(torch, "empty", wrap(torch.empty)),
        mock.patch.object(torch, "empty_like", wrap(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", wrap(torch.Tensor.new_empty)),
    ):
        yield


def fill(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN in place."""
    if tensor.element_size() == 1:  # 0x7F is E4M3's NaN
        tensor.view(torch.uint8).fill_(0x7F)
    elif tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


def spread(x: torch.Tensor, margin: int = 16) -> torch.Tensor:
    """The same matrix as a part of a wider one whose other columns hold NaN."""
    wide = fill(torch.empty(x.shape[0] + 1, x.shape[1] + 2 * margin, dtype=x.dtype, device=x.device))
    inner = wide[: x.shape[0], margin : margin + x.shape[1]]
    return inner.copy_(x)


def assert_same(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Equal shapes, dtypes and bits; NaN equals any NaN."""
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, (
            f"result {i}: {a.dtype} {a.shape}, not {b.dtype} {b.shape}"
        )
        a, b = a.cpu().float(), b.cpu().float()
        assert torch.equal(a.isnan(), b.isnan()), f"result {i}: NaN in other places"
        same = (a == b) & (a.signbit() == b.signbit()) | a.isnan()
        assert same.all(), (
            f"result {i}: {int((~same).sum())} of {same.numel()} differ, first {first(a, b, same)}"
        )


def first(a: torch.Tensor, b: torch.Tensor, same: torch.Tensor) -> str:
    """The first place at which two tensors differ, and what they hold there."""
    place = tuple((~same).nonzero()[0].tolist())
    return f"{place}: {a[place].item()!r}, not {b[place].item()!r}"
