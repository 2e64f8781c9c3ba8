"""The Triton kernels: by the interpreter on CPU tensors (TRITON_INTERPRET=1, set before swiftk is imported, so in a pytest call
of its own), or on a CUDA device where torch sees one. `make test` does the first, `make gpu PART=test` the second."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from swiftk.kernels._triton import INTERPRETED

ON_CUDA = torch.cuda.is_available() and not INTERPRETED


def pytest_collection_modifyitems(items):
    if not (INTERPRETED or ON_CUDA):
        for item in items:
            if "tests/triton/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="set TRITON_INTERPRET=1, or run on a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def language_patched_once():
    """A launch patches triton.language for the interpreter, and every call of a device function does so again, a quarter of the
    time: once per launch and file is enough."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patch, execute, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def launched(self, *args, **kwargs):
        done.clear()  # its end takes the patches back
        return execute(self, *args, **kwargs)

    def once(fn):
        if id(fn.__globals__) not in done:
            done.add(id(fn.__globals__))
            return patch(fn)

    with mock.patch.object(interpreter.GridExecutor, "__call__", launched), mock.patch.object(interpreter, "_patch_lang", once):
        yield


@pytest.fixture
def device():
    return torch.device("cuda" if ON_CUDA else "cpu")


# fp16 is no dtype of the public functions, but is what the interpreter can round to: its bf16 is wrong
@pytest.fixture(params=[torch.float32, torch.bfloat16 if ON_CUDA else torch.float16], ids=str)
def dtype(request):
    return request.param
