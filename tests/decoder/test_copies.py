"""What is sent to a device: everything in one copy, whose pieces are what they were."""

from __future__ import annotations

import torch

from swiftk.decoder import sampler
from swiftk.decoder.copies import ALIGN, send
from swiftk.decoder.params import SamplingParams
from swiftk.decoder.sampler import Row, Sampler

CUDA = torch.device("cuda:0")
MIXED = (
    torch.tensor([3, 2**40, -1]), torch.tensor([True, False, True]), torch.zeros(0), torch.randn(5),
    torch.tensor([7], dtype=torch.int32), torch.randn(2, 3, dtype=torch.float64),
)  # fmt: skip


def test_one_copy_from_pinned_memory(monkeypatch):
    copies, empty = [], torch.empty

    def pinned(*args, pin_memory, **options):
        assert pin_memory
        return empty(*args, **options).fill_(0xAB)

    def to(t, device, non_blocking):
        copies.append((t, device, non_blocking))
        return t.clone()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", pinned)
        patch.setattr(torch.Tensor, "to", to)
        there = send(CUDA, *MIXED)
    ((here, *where),) = copies
    assert where == [CUDA, True] and here.nbytes == sum(-(-t.nbytes // ALIGN) * ALIGN for t in MIXED)
    for got, want in zip(there, MIXED, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
        assert got.is_contiguous() and got.storage_offset() * got.element_size() % ALIGN == 0
    assert all(a is b for a, b in zip(send(torch.device("cpu"), *MIXED), MIXED, strict=True))


def test_the_samplers_kernels_read_what_was_sent(monkeypatch):
    """Beside the logits and what they write: of a tensor that is made on the host none reaches a kernel of a GPU."""
    sent, seen = [], {}

    def spy(device, *tensors):
        sent.extend(t.clone() for t in tensors)
        return tuple(sent[len(sent) - len(tensors) :])

    def kernel(name, f):
        def run(*args):
            tensors = [t for a in args for t in (a if isinstance(a, tuple) else (a,)) if isinstance(t, torch.Tensor)]
            seen[name] = sum(any(t is one for one in sent) for t in tensors), len(tensors)
            f(*args)

        return run

    monkeypatch.setattr(sampler, "send", spy)
    for name in ("adjust_logits_out", "sample_out", "row_logprobs_out"):
        monkeypatch.setattr(sampler, name, kernel(name, getattr(sampler, name)))
    params = SamplingParams(repetition_penalty=1.4, logprobs=2), SamplingParams()
    rows = [Row(p, [1, 2], [3], 3, 5, frozenset()) for p in params]
    Sampler(10)(torch.randn(2, 10), rows)
    assert seen == {"adjust_logits_out": (8, 9), "sample_out": (6, 8), "row_logprobs_out": (1, 7)}
    assert [t.tolist() for t in sent[-2:]] == [[0], [sent[-1].item()]]  # the row and the token that are scored
