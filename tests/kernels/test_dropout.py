"""dropout: the generator's published vectors, kernels against the reference, what a mask depends on, contracts, errors."""

from __future__ import annotations

import math

import pytest
import torch

from swiftk.kernels.dropout import Dropout, dropout, dropout_ref, keep_ref, philox_ref

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def make(rows: int, p: float = 0.3, seed: int = 7, step: int = 3, layer: int = 5) -> Dropout:
    token = (torch.arange(rows) % 3 << 32) + torch.arange(rows) * 977 + 2**31 - 2  # both halves, the low one past 2^31
    return Dropout(p, torch.tensor([seed, step]), layer, token)


def kept(rows: int = 40, columns: int = 300, **kwargs) -> torch.Tensor:
    return dropout(torch.ones(rows, columns), make(rows, **kwargs)) != 0


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [  # philox4x32 with 10 rounds, kat_vectors of the Random123 distribution
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(counter, key, want):
    got = philox_ref([torch.tensor([c]) for c in counter], key)
    assert tuple(int(w) for w in got) == want


def test_counter_and_draws_are_the_documented_ones():
    """One element, from the docstring's formula in Python integers."""
    seed, step, layer, token, column = -(2**40) - 5, 2**33 + 11, 513, (9 << 32) + 2**32 - 7, 1037
    mask = 0xFFFFFFFF
    counter = [layer << 16 | column // 8, step & mask, token & mask, token >> 32]
    key = [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        p, q = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [q >> 32 ^ counter[1] ^ key[0], q & mask, p >> 32 ^ counter[3] ^ key[1], p & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    draw = counter[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF
    for threshold, want in ((draw, True), (draw + 1, False)):  # kept where draw >= threshold
        d = Dropout(threshold / 65536, torch.tensor([seed, step]), layer, torch.tensor([token]))
        assert bool(keep_ref(d, 2000)[0, column]) is want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 127, 128, 129, 700])
def test_kernels_equal_the_reference(columns, dtype, isa, thread_count):
    x, d = torch.randn(19, columns, dtype=torch.float64).to(dtype), make(19)
    want = dropout_ref(x, d)
    for threads in (1, 2):
        assert torch.equal(thread_count(threads, lambda: dropout(x, d, isa=isa)), want)
    assert 0 < (want != 0).sum() < want.numel() or columns == 1


def test_wide_counters(isa):
    """Seed, step and token past 2^32, the last layer, columns far out."""
    x = torch.randn(3, 70_000)
    d = Dropout(0.5, torch.tensor([-3 - (7 << 33), 5 << 31]), 65535, torch.tensor([(2**31 - 1) << 32 | 2**32 - 1, 0, -1]))
    assert torch.equal(dropout(x, d, isa=isa), dropout_ref(x, d))


def test_a_mask_belongs_to_the_token():
    """Any split, order and packing of the same tokens."""
    x, d = torch.randn(50, 200), make(50)
    whole = dropout(x, d)
    order = torch.randperm(50)
    assert torch.equal(dropout(x[order], d._replace(token_index=d.token_index[order])), whole[order])
    parts = [dropout(x[i : i + 7], d._replace(token_index=d.token_index[i : i + 7])) for i in range(0, 50, 7)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(dropout(x.view(5, 10, 200), d).flatten(0, 1), whole)


@pytest.mark.parametrize("p", [1 / 65536, 0.05, 0.1, 0.5, 0.95])
def test_rate_is_binomial(p):
    keep = kept(400, 1000, p=p)
    n, q = keep.numel(), round(p * 65536) / 65536
    assert abs((~keep).sum().item() - n * q) <= 5 * math.sqrt(n * q * (1 - q)) + 1
    assert abs((~keep).float().mean(0) - q).max() <= 6 * math.sqrt(q * (1 - q) / 400) + 1 / 400
    assert abs((~keep).float().mean(1) - q).max() <= 6 * math.sqrt(q * (1 - q) / 1000) + 1 / 1000


@pytest.mark.parametrize("other", [{"layer": 6}, {"step": 4}, {"seed": 8}, {"seed": 7 + 2**32}, {"layer": 5 + 256}])
def test_masks_of_other_layers_steps_and_seeds_are_independent(other):
    a, b = kept(400, 500, p=0.5), kept(400, 500, p=0.5, **other)
    agree = (a == b).sum().item()
    assert abs(agree - a.numel() / 2) <= 5 * math.sqrt(a.numel()) / 2
    rows, columns = kept(400, 500, p=0.5)[:-1] == a[1:], a[:, :-1] == a[:, 1:]
    for same in (rows, columns):
        assert abs(same.sum().item() - same.numel() / 2) <= 5 * math.sqrt(same.numel()) / 2


def test_expectation_scale_and_dropped_nan():
    x = torch.full((200, 500), 3.0)
    y = dropout(x, make(200, p=0.25))
    assert torch.equal(y[y != 0], torch.full_like(y[y != 0], 4.0)) and abs(y.mean() - 3) < 0.05
    assert torch.equal(dropout(x, make(200, p=0.0)), x)
    x[:, ::2] = float("nan")
    y = dropout(x, make(200, p=0.25))
    assert torch.equal(y.isnan(), x.isnan() & keep_ref(make(200, p=0.25), 500))


def test_empty_and_non_contiguous():
    assert dropout(torch.empty(0, 5), make(0)).shape == (0, 5)
    assert dropout(torch.empty(4, 0), make(4)).shape == (4, 0)
    x = torch.randn(30, 8).t()
    assert torch.equal(dropout(x, make(8)), dropout(x.contiguous(), make(8)))
    token = make(16).token_index
    d = make(8)._replace(token_index=token[::2], seed_step=torch.tensor([5, 1, 9, 2])[::2])
    assert torch.equal(dropout(x, d), dropout_ref(x, d))


def test_gradient_is_the_same_mask():
    x, d = torch.randn(9, 40, dtype=torch.float64, requires_grad=True), make(9)
    dy = torch.randn(9, 40, dtype=torch.float64)
    first = torch.autograd.grad(dropout(x, d), x, dy)[0]
    assert torch.equal(first, dropout_ref(dy, d))
    assert torch.autograd.gradcheck(lambda t: dropout(t, d), x) and torch.autograd.gradgradcheck(lambda t: dropout(t, d), x)


def test_opcheck_and_compile_without_recompilation():
    x, d = torch.randn(6, 40, requires_grad=True), make(6)
    torch.library.opcheck(torch.ops.swiftk.dropout_fwd.default, (x, d.threshold, d.seed_step, d.layer, d.token_index, "auto"))
    compiles = []

    def backend(graph, inputs):
        compiles.append(1)
        return graph

    compiled = torch.compile(dropout, fullgraph=True, backend=backend)
    for step in range(3):
        now = d._replace(seed_step=torch.tensor([7, step]))
        assert torch.equal(compiled(x, now), dropout(x, now))
    assert len(compiles) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 1.0}, r"p has 1.0, wants 0 <= p <= 65535 / 65536"),
        ({"p": -0.1}, r"p has -0.1"),
        ({"layer": 65536}, r"layer has 65536, wants 0 <= layer < 65536"),
        ({"seed_step": torch.zeros(3, dtype=torch.int64)}, r"seed_step has shape \(3,\), x \(2, 4\) needs \(2,\)"),
        ({"token_index": torch.zeros(2, dtype=torch.int32)}, "token_index has dtype torch.int32, wants torch.int64 .dropout"),
        ({"token_index": torch.zeros(3, dtype=torch.int64)}, r"token_index has shape \(3,\), x \(2, 4\) needs \(2,\)"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=r"dropout: dropout\." + message):
        dropout(torch.randn(2, 4), make(2)._replace(**change))
    with pytest.raises(ValueError, match=r"dropout: x has shape \(\)"):
        dropout(torch.tensor(1.0), make(1))
    with pytest.raises(ValueError, match="dropout: x has 600000 columns"):
        dropout(torch.empty(1, 1).expand(1, 600_000), make(1))
    with pytest.raises(ValueError, match=r"dropout: dropout has type float, wants a Dropout\(p, seed_step, layer, token_index"):
        dropout(torch.randn(2, 4), 0.1)
    with pytest.raises(ValueError, match="dropout: isa has 'sse9'"):
        dropout(torch.randn(2, 4), make(2), isa="sse9")
