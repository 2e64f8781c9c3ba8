"""The CUDA kernels of nf4 and nf4_linear on a CUDA device: golden vectors, the bytes of the CPU, products against fp64, rows by
themselves, streams, graphs.

tests/kernels/test_nf4*.py run the same bodies on the CPU; what a GPU alone shows is its conversions, instructions and launches.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import swiftk.kernels.nf4_linear as module
from swiftk.kernels.linear import Product, linear_ref
from swiftk.kernels.nf4 import BLOCKSIZES, NF4Tensor, nf4_dequantize, nf4_dequantize_out, nf4_dequantize_ref, nf4_quantize
from swiftk.kernels.nf4_linear import matmul_weight, nf4_linear, nf4_linear_group_out, nf4_linear_ref
from swiftk.testing.accuracy import assert_accurate
from tests.kernels.test_nf4 import CASES, DTYPES, THRESHOLDS, assert_golden, bits, same, source

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


def on_cpu(w: NF4Tensor) -> NF4Tensor:
    nested = None if w.nested is None else type(w.nested)(*(t.cpu() for t in w.nested))
    return w._replace(codes=w.codes.cpu(), absmax=w.absmax.cpu(), nested=nested)


def on_cuda(w: NF4Tensor) -> NF4Tensor:
    nested = None if w.nested is None else type(w.nested)(*(t.cuda() for t in w.nested))
    return w._replace(codes=w.codes.cuda(), absmax=w.absmax.cuda(), nested=nested)


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    for x in (source(case), source(case).double()):
        w = nf4_quantize(x.cuda(), blocksize=case["blocksize"])
        assert_golden(case, on_cpu(w), nf4_dequantize(w).cpu(), nf4_dequantize(w, torch.float32).cpu())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_the_bytes_of_the_cpu(blocksize, dtype, nested):
    for N, K in ((1, 1), (3, 7), (5, 2055), (130, 4304), (0, 5), (5, 0), (17, 8192), *((4, 64 + k) for k in range(8))):
        x = torch.randn(N, K, dtype=torch.float64).to(dtype)
        w, want = (nf4_quantize(t, blocksize=blocksize, nested=nested) for t in (x.cuda(), x))
        assert torch.equal(w.codes.cpu(), want.codes) and bits(w.absmax.cpu()) == bits(want.absmax), (N, K)
        for out in (torch.bfloat16, torch.float32):
            ours = torch.empty(N, K, dtype=out, device="cuda")
            nf4_dequantize_out(w, ours)  # decodes a nested absmax as it reads it
            assert torch.equal(ours, nf4_dequantize(w, out)) and bits(ours.cpu()) == bits(nf4_dequantize(want, out)), (N, K)


def test_values_around_thresholds():
    exponents = torch.arange(-126, 128).repeat(3)
    absmax = torch.ldexp(1 + torch.randint(0, 2**23, exponents.shape) / 2**23, exponents)
    x = (THRESHOLDS * absmax[:, None]).repeat(1, 3)
    x[:, 15:30] = torch.nextafter(x[:, 15:30], torch.tensor(float("inf")))
    x[:, 30:] = torch.nextafter(x[:, 30:], torch.tensor(float("-inf")))
    x = torch.cat([absmax[:, None], x], 1)
    for y in (x, x.bfloat16()):
        assert same(on_cpu(nf4_quantize(y.cuda())), nf4_quantize(y))


def test_every_code_of_many_absmax():
    absmax = torch.cat([torch.arange(0x7F80).to(torch.uint16).view(torch.bfloat16).float(), torch.randn(5000).abs()])[:, None]
    codes = torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 4, dtype=torch.uint8).expand(len(absmax), 32)
    for a in (absmax, absmax.bfloat16()):
        w = NF4Tensor(codes, a, 64)
        for dtype in (torch.bfloat16, torch.float32):
            assert bits(nf4_dequantize(on_cuda(w), dtype).cpu()) == bits(nf4_dequantize_ref(w, dtype))


@pytest.mark.parametrize("K", [1, 33, 64, 100, 2049])
def test_frames(K):
    for left in (1, 2, 4, 8):
        frame = torch.full((6, K + 16), float("nan"))
        frame[1:-1, left : left + K] = torch.randn(4, K)
        w, want = nf4_quantize(frame.cuda()[1:-1, left : left + K]), nf4_quantize(frame[1:-1, left : left + K])
        assert same(on_cpu(w), want)
        out = torch.full((6, K + 16), float("nan"), dtype=torch.bfloat16, device="cuda")
        nf4_dequantize_out(w, out[1:-1, left : left + K])
        assert torch.equal(out[1:-1, left : left + K].cpu(), nf4_dequantize_ref(want))
        out[1:-1, left : left + K] = float("nan")
        assert out.isnan().all()


def test_not_finite():
    x = torch.randn(9, 150)
    x[7, 149], x[4, 70] = float("inf"), float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in row 4, block 1 \(columns 64 to 127\)"):
        nf4_quantize(x.cuda())


def test_a_side_stream_and_a_graph():
    """Both see the values of their own order; in a graph nothing is read back, and what is not finite stays so."""
    x = torch.randn(64, 512, device="cuda")
    want = nf4_dequantize(nf4_quantize(x))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late = x * 2
        got = nf4_dequantize(nf4_quantize(late))
    side.synchronize()
    assert torch.equal(got, nf4_dequantize(nf4_quantize(x * 2)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = nf4_dequantize(nf4_quantize(x))
    graph.replay()
    assert torch.equal(captured, want)
    x[3, 100] = float("inf")
    graph.replay()
    assert captured[3, 64:128].isnan().all() and torch.equal(captured[4:], want[4:])


@pytest.mark.long
def test_more_than_2_31_elements():
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("wants 16 GB of device memory")
    rows = (1 << 31) // 4096 + 8
    codes = torch.randint(0, 256, (rows, 2048), dtype=torch.uint8, device="cuda")
    w = NF4Tensor(codes, torch.rand(rows, 64, device="cuda"), 4096)
    out = nf4_dequantize(w)
    for r in (0, rows - 9, rows - 1):
        row = w._replace(codes=codes[r : r + 1], absmax=w.absmax[r : r + 1])
        assert torch.equal(out[r].cpu(), nf4_dequantize(on_cpu(row))[0])


# --- nf4_linear --------------------------------------------------------------------------------------------------


def weight(N: int, K: int, dtype=torch.bfloat16, **options) -> NF4Tensor:
    w = torch.randn(N, K) * torch.logspace(-2, 1, max(K, 1))[:K] * torch.rand(N, 1)
    return on_cuda(nf4_quantize(w.to(dtype), **options))


def accurate(y: torch.Tensor, x: torch.Tensor, w: NF4Tensor) -> None:
    exact = nf4_linear_ref(x.double().cpu(), on_cpu(w))
    plain = F.linear(x.float().cpu(), nf4_dequantize(on_cpu(w)).float()).to(y.dtype)
    assert_accurate(y.cpu(), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "K", "options"),
    [
        (1, 1, {}), (17, 333, {}), (40, 2080, {"blocksize": 32}), (33, 4500, {"blocksize": 256}), (130, 4096, {}),
        (35, 321, {"nested": True}), (1024, 512, {}), (0, 64, {}), (5, 0, {}),
    ],
)  # fmt: skip
def test_products(N, K, options, dtype):
    """In every number of rows that another tile or path takes; gradients by slices."""
    w = weight(N, K, **options)
    for M in (1, 2, 8, 9, 16, 33, 64, 65, 300):
        x = torch.randn(M, K, device="cuda", dtype=torch.float64).to(dtype)
        for numerics in ("auto", "invariant"):
            y = nf4_linear(x, w, numerics=numerics)
            assert y.shape == (M, N) and y.dtype == dtype
            accurate(y, x, w)
        dy = torch.randn(M, N, device="cuda", dtype=torch.float64).to(dtype)
        exact = dy.double().cpu() @ nf4_dequantize(on_cpu(w)).double()
        dx = matmul_weight(dy, w)
        assert_accurate(dx.cpu(), (dy.cpu().float() @ nf4_dequantize(on_cpu(w)).float()).to(dtype), exact)


def test_slices_of_a_large_weight(monkeypatch):
    monkeypatch.setitem(module.SLICE_BYTES, "cuda", 100_000)
    for dtype in DTYPES:
        w, x = weight(300, 520, nested=True), torch.randn(100, 520, device="cuda").to(dtype)
        accurate(nf4_linear(x, w), x, w)
        dy = torch.randn(100, 300, device="cuda").to(dtype)
        exact = dy.double().cpu() @ nf4_dequantize(on_cpu(w)).double()
        plain = (dy.float().cpu() @ nf4_dequantize(on_cpu(w)).float()).to(dtype)
        assert_accurate(matmul_weight(dy, w).cpu(), plain, exact)


def test_a_row_is_a_function_of_that_row():
    """Bitwise: any number of rows up to SMALL_ROWS, with "invariant" beyond, whatever the other rows are."""
    w = weight(200, 4300)
    x = torch.randn(300, 4300, device="cuda").bfloat16()
    whole = nf4_linear(x, w, numerics="invariant")
    for M in (1, 3, 8, 16, 17, 32, 64, 65, 200):
        assert torch.equal(nf4_linear(x[:M], w, numerics="invariant"), whole[:M]), M
        if M <= module.SMALL_ROWS:
            assert torch.equal(nf4_linear(x[:M], w), whole[:M]), M
    poisoned = x.clone()
    poisoned[1:] = float("nan")
    assert torch.equal(nf4_linear(poisoned, w, numerics="invariant")[0], whole[0])


@pytest.mark.parametrize("M", [1, 12, 40, 100])
def test_tail_scale_bias_and_groups(M):
    x = torch.randn(M, 520, device="cuda").bfloat16()
    weights = [weight(N, 520, nested=nested) for N, nested in ((70, False), (33, True), (16, False), (5, False), (48, False))]
    s = torch.randn(M, 19, device="cuda").bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        group = []
        for w in weights:
            N = w.shape[0]
            t, b = (torch.randn(shape, device="cuda").bfloat16() for shape in ((N, 19), (N,)))
            y = torch.full((M, N), float("nan"), device="cuda", dtype=dtype)
            group.append(Product(w, b, y, (s, t), torch.randn(N, device="cuda")))
        nf4_linear_group_out(x, group)
        for p in group:
            d, (su, t) = nf4_dequantize(on_cpu(p.weight)), (u.cpu() for u in p.tail)
            args = x.cpu(), d, p.bias.cpu()
            plain, exact = (
                linear_ref(*(u.to(wide) for u in args), tail=(su.to(wide), t.to(wide)), scale=p.scale.cpu())
                for wide in (torch.float32, torch.float64)
            )
            assert_accurate(p.y.cpu(), plain.to(dtype), exact)


def test_products_in_frames():
    for K, left in ((33, 2), (130, 8), (512, 16), (515, 16), (512, 3)):
        w, x = weight(18, K), torch.randn(10, K, device="cuda").bfloat16()
        codes = torch.full((20, w.codes.shape[1] + 64), 255, dtype=torch.uint8, device="cuda")
        codes[1:-1, left : left + w.codes.shape[1]] = w.codes
        frame, out = (torch.full((12, n + 32), float("nan"), dtype=torch.bfloat16, device="cuda") for n in (K, 18))
        frame[1:-1, left : left + K] = x
        framed = w._replace(codes=codes[1:-1, left : left + w.codes.shape[1]])
        nf4_linear_group_out(frame[1:-1, left : left + K], [Product(framed, None, out[1:-1, left : left + 18])])
        assert torch.equal(out[1:-1, left : left + 18], nf4_linear(x, w))
        out[1:-1, left : left + 18] = float("nan")
        assert out.isnan().all()


@pytest.mark.parametrize("M", [1, 40, 100])
def test_products_on_a_side_stream_and_in_a_graph(M):
    w, x = weight(130, 700), torch.randn(M, 700, device="cuda").bfloat16().requires_grad_()

    def both():
        y = nf4_linear(x, w)
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    want = both()
    assert all(torch.equal(a, b) for a, b in zip(want, both(), strict=True))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = both()
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        x.mul_(1.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, both(), strict=True))


def test_compiled():
    w, x = weight(40, 300), torch.randn(5, 300, device="cuda").bfloat16().requires_grad_()
    compiled = torch.compile(lambda x: nf4_linear(x, w), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), nf4_linear(x, w))
