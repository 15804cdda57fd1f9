"""Who computes, and what is refused before anything is launched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.errors import KernelError
from dsv3lib.kernels.toolchain import checks, language, targets

CPU = torch.device("cpu")


def test_cpu_tensors_go_to_the_reference_and_none_is_passed_over():
    x = torch.zeros(2)
    assert not targets.on_triton(x, None) and not targets.available(x)


def test_different_devices_and_devices_without_kernels_are_refused():
    with pytest.raises(KernelError, match=r"different devices \(cpu, meta\)"):
        targets.on_triton(torch.zeros(1), torch.zeros(1, device="meta"))
    with pytest.raises(KernelError, match="no kernel for meta"):
        targets.on_triton(torch.zeros(1, device="meta"))
    assert not targets.available(torch.zeros(1, device="meta"))


class OnCuda:
    """Stands in for a CUDA tensor where there is no GPU."""

    device = torch.device("cuda:0")
    is_cuda = True


def ask(function, *arguments):
    return getattr(function, "__wrapped__", function)(*arguments)  # annotations would refuse the stand-in


def test_a_gpu_without_triton_and_a_gpu_too_old_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(language, "INSTALLED", True)  # on macOS too
    monkeypatch.setattr(targets, "capability", lambda device: (7, 5))
    with pytest.raises(KernelError, match=r"compute capability \(7, 5\)"):
        ask(targets.on_triton, OnCuda())
    assert not ask(targets.available, OnCuda())
    monkeypatch.setattr(language, "INSTALLED", False)
    with pytest.raises(KernelError, match="Triton is not installed.*_ref"):
        ask(targets.on_triton, OnCuda())
    assert not ask(targets.available, OnCuda())


def test_a_gpu_takes_the_kernel_and_fp8_only_where_it_exists(monkeypatch):
    monkeypatch.setattr(language, "INSTALLED", True)
    monkeypatch.setattr(targets, "capability", lambda device: (8, 6))
    assert ask(targets.on_triton, OnCuda()) and ask(targets.available, OnCuda())
    with pytest.raises(KernelError, match="gemm_fp8: cuda:0 .*needs 8.9"):
        targets.require_fp8("gemm_fp8", torch.device("cuda:0"))
    monkeypatch.setattr(targets, "capability", lambda device: (9, 0))
    targets.require_fp8("gemm_fp8", torch.device("cuda:0"))
    targets.require_fp8("gemm_fp8", CPU)


def test_dtypes_and_shapes_are_named():
    x = torch.zeros(2, 3)
    checks.require_dtype("op", "x", x, [torch.float32])
    with pytest.raises(KernelError, match="op: x is float32, expected bfloat16 or float16"):
        checks.require_dtype("op", "x", x, [torch.bfloat16, torch.float16])
    checks.require_shape("op", "x", x, [2, None])
    for wrong in ([3, None], [2], [2, 3, 1]):
        with pytest.raises(KernelError, match=r"op: x has shape \[2, 3\], expected"):
            checks.require_shape("op", "x", x, wrong)


@given(value=st.integers(0, 1000), divisor=st.sampled_from([16, 128]))
def test_a_size_that_does_not_divide_is_told_its_padding(value, divisor):
    if value % divisor == 0:
        checks.require_multiple("op", "K", value, divisor)
        return
    with pytest.raises(KernelError, match="op: K is") as refused:
        checks.require_multiple("op", "K", value, divisor)
    padding = int(str(refused.value).split("pad it by ")[1].split()[0])
    assert 0 < padding < divisor and (value + padding) % divisor == 0


def test_strides_and_alignment():
    x = torch.zeros(8, 64, dtype=torch.float8_e4m3fn)
    checks.require_aligned("op", "x", x)
    checks.require_aligned("op", "x", x[:, :16])
    checks.require_rows("op", "x", x[:, 1:9])
    with pytest.raises(KernelError, match="stride 1"):
        checks.require_rows("op", "x", x.t())
    with pytest.raises(KernelError, match="starts 1 bytes past"):
        checks.require_aligned("op", "x", x[:, 1:])
    with pytest.raises(KernelError, match=r"\[8\] bytes apart"):
        checks.require_aligned("op", "x", torch.zeros(8, 8, dtype=torch.uint8))
    checks.require_aligned("op", "x", torch.zeros(1, 8, dtype=torch.uint8))  # a single row has no next one


def test_jit_leaves_functions_alone_without_triton(monkeypatch):
    monkeypatch.setattr(language, "INSTALLED", False)

    def kernel():
        return 1

    assert language.jit(kernel) is kernel


def test_a_kernel_is_available_where_triton_is(monkeypatch):
    tensor = torch.zeros(2)
    assert not targets.available(tensor)
    monkeypatch.setattr(targets, "interpreted", lambda: True)
    assert targets.available(tensor)
    assert not targets.available(torch.zeros(2, device="meta"))
