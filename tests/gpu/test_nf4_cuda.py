"""The CUDA kernels of nf4 on a CUDA device: the golden vectors, the bytes of the CPU's op, streams, graphs.

tests/kernels/test_nf4.py runs the same bodies on the CPU; what only a GPU shows is its conversions, its loads and its launches.
"""

from __future__ import annotations

import pytest
import torch

from swiftk.kernels.nf4 import BLOCKSIZES, NF4Tensor, nf4_dequantize, nf4_dequantize_out, nf4_dequantize_ref, nf4_quantize
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
