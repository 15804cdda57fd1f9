"""Kernels against their references: on the GPU where there is one, else in Triton's interpreter.

Triton reads ``TRITON_INTERPRET`` when it is first imported, so these tests are a phase of their own:
``python tools/run_tests.py kernels``, which sets it where no GPU is found.
"""

import pytest
import torch

from dsv3lib.kernels.toolchain import language, targets

ON_GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuses to compare a reference with itself."""
    if not language.INSTALLED:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="Triton exists for Linux alone: nothing to compare"))
    elif not ON_GPU and not targets.interpreted():
        raise pytest.UsageError(
            "the kernel tests need a GPU or Triton's interpreter: "
            "run `python tools/run_tests.py kernels`, or set TRITON_INTERPRET=1"
        )


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in this session."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="session")
def matrix_dtype() -> torch.dtype:
    """What matrix kernels are fed: bf16 on a GPU; fp16 in the interpreter, whose bf16 products are garbage."""
    return torch.bfloat16 if ON_GPU else torch.float16
