"""TRITON_DEBUG=1: what kernels assert on the device holds for good input and says what is wrong with bad; without it bad input
stays within its tensors."""

from __future__ import annotations

import contextlib

import pytest
import torch

from swiftk.kernels._triton import INTERPRETED
from swiftk.kernels.adamw_8bit import adamw_8bit_
from swiftk.kernels.attention import paged_attention, segment_attention, store_kv_, varlen_attention
from swiftk.kernels.attention.varlen import attention_out
from swiftk.kernels.dropout import Dropout, dropout
from swiftk.kernels.rope import rope, rope_table
from swiftk.kernels.sample import row_logprobs, sample
from tests.kernels.test_adamw_8bit import make as an_update
from tests.triton.launched import asserts, device_asserts

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU an assertion ends the process's use of the device")


def ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def varlen(cu, cu_k=None, heads=3, tokens=90):
    q, k = torch.randn(tokens, heads, 16, requires_grad=True), torch.randn(tokens, 1, 16, requires_grad=True)
    out, lse = varlen_attention(q, k, k, ints(*cu), None if cu_k is None else ints(*cu_k), causal=True, return_lse=True)
    (out.sum() + lse.masked_fill(lse.isinf(), 0.0).sum()).backward()


def segments(*rows):
    q, k = torch.randn(20, 2, 16), torch.randn(20, 1, 16)
    segment_attention(q, k, k, ints(*rows))


def paged(numerics, lens=(5, 20), table=((1, 0), (2, 3)), cu=None, blocks=4, tokens=2):
    cache = torch.randn(blocks, 16, 1, 16)
    q = torch.randn(tokens, 2, 16)
    cu = None if cu is None else ints(*cu)
    return paged_attention(q, cache, cache, ints(*table), ints(*lens), cu, return_lse=True, numerics=numerics)


def store(*slots):
    x, cache = torch.randn(len(slots), 1, 16), torch.zeros(2, 4, 1, 16)
    store_kv_(x, x, cache, cache.clone(), torch.tensor(slots))


def rotate(*positions):
    cos, sin = rope_table(8, 16)
    rope(torch.randn(len(positions), 2, 8), cos, sin, torch.tensor(positions))


GOOD = {
    "documents": lambda: varlen([0, 5, 5, 70, 90]),
    "a tail": lambda: varlen([0, 5, 60], [0, 9, 70]),
    "segments": lambda: segments([0, 3, 0, 4, 2, 0], [3, 5, 4, 6, 0, 0]),
    "paged": lambda: paged("auto"),
    "paged, many queries": lambda: paged("auto", (5, 40), ((1, 0, 0), (2, 3, 1)), [0, 4, 40], tokens=41),
    "paged, invariant, padded": lambda: paged("invariant", (5, 0, 0), ((1, 0), (9, 9), (9, 9)), [0, 1, 1, 1]),
    "store": lambda: store(0, -1, 7),
    "rope": lambda: rotate(0, 15),
}
BAD = {
    "cu decreases": (lambda: varlen([0, 24, 48, 72, 1]), "cu_seqlens or segments decrease"),
    "cu begins with more than 0": (lambda: varlen([34, 35, 36]), "cu_seqlens or segments decrease"),
    "cu beyond the tokens": (lambda: varlen([0, 200]), "beyond the tensors"),
    "a segment beyond the tokens": (lambda: segments([0, 3, 15, 9, 2, 0]), "beyond the tensors"),
    "store": (lambda: store(8), "slot_mapping is out of range"),
    "rope": (lambda: rotate(16), "rope"),
}
for _numerics in ("auto", "invariant"):
    BAD |= {
        f"cu_seqlens_q decreases, {_numerics}": (lambda n=_numerics: paged(n, cu=[0, 2, 1]), "cu_seqlens_q"),
        f"cu_seqlens_q begins with 1, {_numerics}": (lambda n=_numerics: paged(n, cu=[1, 1, 2]), "begin with 0"),
        f"lengths past the table, {_numerics}": (lambda n=_numerics: paged(n, (5, 2**31 - 1)), "beyond the block table"),
        f"more queries than keys, {_numerics}": (lambda n=_numerics: paged(n, (1, 1), cu=[0, 2, 2]), "more tokens than"),
        f"a far block, {_numerics}": (lambda n=_numerics: paged(n, table=((2 * 10**9, 0), (-(10**9), 3))), "block_table"),
        f"no blocks, {_numerics}": (lambda n=_numerics: paged(n, blocks=0), "paged_attention"),
    }


@pytest.mark.parametrize("call", GOOD.values(), ids=GOOD)
def test_nothing_is_asserted_of_what_is_right(call):
    with device_asserts():
        call()


@pytest.mark.parametrize("call, text", BAD.values(), ids=BAD)
def test_what_is_wrong_is_named_and_stays_within_its_tensors(call, text):
    with asserts(text):
        call()
    call()


def test_numbers_that_wrap_on_purpose_are_no_errors():
    """Hashes and buckets: Triton would assert that no integer wraps."""
    with device_asserts():
        dropout(torch.randn(9, 16), Dropout(0.5, torch.tensor([2**62, 7]), 3, torch.arange(9)))
        logits = torch.randn(2, 40)
        half = torch.full((2,), 0.5)
        sample(logits, half, ints(5, 0), half, half * 0, torch.tensor([2**62, 3]), torch.tensor([5, 6]))
        row_logprobs(logits, torch.tensor([3, 4]), top=2)
        adamw_8bit_([an_update(3000, torch.float32, step=2, min_8bit=0)])


@contextlib.contextmanager
def guarded(*shape):
    """A tensor with a page of ones on both sides, which stay."""
    flat = torch.ones(2048 + torch.Size(shape).numel())
    yield flat[1024:-1024].view(shape)
    assert (flat[:1024] == 1).all() and (flat[-1024:] == 1).all()


@pytest.mark.parametrize("cu", [[0, 24, 48, 72, 1], [34, 35, 36], [5, 4, 3]])
def test_offsets_that_are_none_write_into_their_tensors_alone(cu):
    q, k = torch.randn(90, 3, 16), torch.randn(90, 1, 16)
    with guarded(90, 3, 16) as out, guarded(3, 90) as lse:
        attention_out(q, k, k, (ints(*cu), ints(*cu)), None, 0.25, 0.0, -1, 0, out, lse)
