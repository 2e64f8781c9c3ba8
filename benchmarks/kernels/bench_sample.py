"""sample: one decoding step's tokens, against softmax, sort and multinomial in torch; and their log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from swiftk.benchmarks.harness import Case, Options
from swiftk.kernels.sample import empty_logprobs, row_logprobs_out, row_logprobs_ref, sample_out, sample_ref

SETTINGS = {  # temperature, top-k, top-p, min-p
    "greedy": (0.0, 0, 1.0, 0.0), "T=1": (1.0, 0, 1.0, 0.0), "top-k 50": (1.0, 50, 1.0, 0.0), "top-p 0.9": (1.0, 0, 0.9, 0.0),
    "top-k 50, top-p 0.9": (0.8, 50, 0.9, 0.0), "min-p 0.05": (1.0, 0, 1.0, 0.05),
}  # fmt: skip


SHAPES = {"cpu": [(1, 32_000), (1, 151_936), (64, 32_000)], "cuda": [(1, 151_936), (64, 151_936)]}


def cases(options: Options) -> Iterator[Case]:
    for rows, vocab in [(2, 3000)] if options.quick else SHAPES[options.device]:
        logits = 3 * torch.randn(rows, vocab, device=options.device)  # nats apart as a trained model's are
        for name in SETTINGS if rows < 64 else ("greedy", "T=1", "top-p 0.9"):
            yield case(logits, name, options)
        yield logprobs(logits, options)


def case(logits: torch.Tensor, name: str, options: Options) -> Case:
    rows, vocab = logits.shape
    t, k, p, m = SETTINGS[name]
    device = options.device
    columns = (
        torch.full((rows,), t, device=device), torch.full((rows,), k, dtype=torch.int32, device=device),
        torch.full((rows,), p, device=device), torch.full((rows,), m, device=device), torch.arange(rows, device=device),
        torch.full((rows,), 17, device=device),
    )  # fmt: skip
    ids = torch.empty(rows, dtype=torch.int64, device=device)

    def run():
        sample_out(logits, *columns, ids, options.isa)
        return ids

    def check(got):
        assert torch.equal(got, sample_ref(logits, *columns))

    def peer():
        if t == 0:
            return logits.argmax(-1)
        z = logits / t
        if k:
            z = z.masked_fill(z < z.topk(k).values[:, -1:], -torch.inf)
        if p < 1:
            ordered, order = z.sort(-1, descending=True)
            mass = ordered.softmax(-1)
            z = ordered.masked_fill(mass.cumsum(-1) - mass >= p, -torch.inf).gather(-1, order.argsort(-1))
        probability = z.softmax(-1)
        if m:
            probability = probability.where(probability >= m * probability.amax(-1, keepdim=True), 0)
        return probability.multinomial(1)

    return Case(
        op="sample", name=f"{name} {rows} x {vocab}", dtype=logits.dtype, run=run, check=check,
        bytes=logits.numel() * logits.element_size(),  # the row once
        peers={"torch": peer},
    )  # fmt: skip


def logprobs(logits: torch.Tensor, options: Options) -> Case:
    rows, vocab = logits.shape
    ids = logits.argmax(-1)
    out = empty_logprobs(logits, 5)

    def run():
        row_logprobs_out(logits, ids, out, options.isa)
        return out

    def check(got):
        want = row_logprobs_ref(logits.double(), ids, 5)
        assert torch.equal(got.top_ids, want.top_ids) and (got.logprob - want.logprob).abs().max() <= 1e-4

    return Case(
        op="sample", name=f"logprobs, 5 most likely, {rows} x {vocab}", dtype=logits.dtype, run=run, check=check,
        bytes=logits.numel() * logits.element_size(),
        peers={"torch": lambda: (p := logits.log_softmax(-1), p.gather(-1, ids[:, None]), p.topk(5))},
    )  # fmt: skip
