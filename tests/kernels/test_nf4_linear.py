"""nf4_linear: equal to linear on the dequantised weight, gradients, views of a weight, operator contracts, errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from swiftk.kernels import nf4
from swiftk.kernels import nf4_linear as module
from swiftk.kernels._native import acc_dtype, native
from swiftk.kernels.linear import Product, linear, linear_out, linear_ref
from swiftk.kernels.nf4 import NF4Tensor, nf4_dequantize, nf4_quantize
from swiftk.kernels.nf4_linear import matmul_weight, nf4_linear, nf4_linear_group_out, nf4_linear_out, nf4_linear_ref
from swiftk.testing.accuracy import assert_accurate

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
ROWS = (1, 2, 3, 4, 5, 16, 17, 64, 300)


def make(N, K, dtype=torch.float32, **options):
    """A weight whose blocks differ a thousandfold in scale, and one of whose blocks is zero."""
    w = torch.randn(N, K) * torch.logspace(-2, 1, K) * torch.rand(N, 1)
    w[N // 2, : options.get("blocksize", 64)] = 0
    return nf4_quantize(w.to(dtype), **options)


def inputs(M, N, K, dtype):
    x, b = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in ((M, K), (N,)))
    return x, b


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("K", "blocksize", "source", "nested"),
    [
        (64, 64, torch.bfloat16, False), (1, 64, torch.float32, False), (333, 64, torch.bfloat16, False),
        (33, 32, torch.float32, False), (2144, 32, torch.bfloat16, False), (2100, 256, torch.float32, False),
        (1300, 4096, torch.bfloat16, False), (191, 64, torch.float32, True),
    ],
)  # fmt: skip
def test_equal_to_linear_on_the_dequantised_weight(K, blocksize, source, nested, dtype, isa):
    """One row (decoded in registers), one tile, several, more than one block of rows; K past one and two panels."""
    w = make(37, K, source, blocksize=blocksize, nested=nested)
    d = nf4_dequantize(w).to(dtype)
    x, b = inputs(ROWS[-1], 37, K, dtype)
    want = linear(x, d, b, isa=isa)
    for M in ROWS:
        assert torch.equal(nf4_linear(x[:M], w, b, isa=isa), want[:M]), M
    assert torch.equal(nf4_linear(x[:5], w, isa=isa), linear(x[:5], d, isa=isa))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tail_scale_and_the_accumulate_dtype(dtype, isa):
    w = make(45, 1100, torch.bfloat16)
    d, (x, b) = nf4_dequantize(w).to(dtype), inputs(40, 45, 1100, dtype)
    tail, scale = tuple(torch.randn(n, 19).to(dtype) for n in (40, 45)), torch.randn(45, dtype=acc_dtype(dtype))
    for M in (1, 3, 40):
        for out_dtype in {dtype, acc_dtype(dtype)}:
            ours, plain = (torch.full((M, 45), float("nan"), dtype=out_dtype) for _ in range(2))
            now = tail[0][:M], tail[1]
            nf4_linear_out(x[:M], w, b, ours, isa, tail=now, scale=scale)
            linear_out(x[:M], d, b, plain, isa, tail=now, scale=scale)
            assert torch.equal(ours, plain) and not ours.isnan().any(), M


@pytest.mark.parametrize("nested", [False, True])
def test_a_group_equals_its_products(nested, isa, thread_count):
    weights = [make(N, 300, blocksize=size, nested=nested) for N, size in ((70, 64), (33, 128), (32, 64))]
    x, _ = inputs(40, 1, 300, torch.float32)
    for M in (1, 3, 40):
        want = [nf4_linear(x[:M], w, isa=isa) for w in weights]
        for threads in (1, 2, 3):
            group = [Product(w, None, torch.full_like(y, float("nan"))) for w, y in zip(weights, want, strict=True)]
            thread_count(threads, lambda M=M, group=group: nf4_linear_group_out(x[:M], group, isa))
            assert all(torch.equal(p.y, y) for p, y in zip(group, want, strict=True)), (M, threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_counts(dtype, isa, thread_count):
    w, (x, b) = make(70, 300), inputs(140, 70, 300, dtype)
    for M in (1, 5, 140):
        assert torch.equal(*(thread_count(n, lambda M=M: nf4_linear(x[:M], w, b, isa=isa)) for n in (1, 2)))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_row_equals_4096(dtype):
    w, (x, b) = make(256, 1536), inputs(4096, 256, 1536, dtype)
    whole = nf4_linear(x, w, b)
    assert all(torch.equal(nf4_linear(x[m : m + 1], w, b), whole[m : m + 1]) for m in range(0, 4096, 37))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 19, 257), (97, 33, 520)])
def test_values_and_gradients(shape, dtype, isa):
    M, N, K = shape
    w, (x, b) = make(N, K), inputs(M, N, K, dtype)
    dy = torch.randn(M, N, dtype=torch.float64).to(dtype)
    d = nf4_dequantize(w)
    results = []
    for f, cast in ((lambda x, b: nf4_linear(x, w, b, isa=isa), dtype), (lambda x, b: F.linear(x, d.to(x.dtype), b), dtype),
                    (lambda x, b: nf4_linear_ref(x, w, b), torch.float64)):  # fmt: skip
        args = [a.to(cast).requires_grad_() for a in (x, b)]
        y = f(*args)
        results.append([y, *torch.autograd.grad(y, args, dy.to(cast))])
    for name, ours, plain, exact in zip(("y", "dx", "db"), *results, strict=True):
        assert_accurate(ours, plain, exact, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K", "blocksize"), [(33, 1000, 64), (64, 257, 32), (5, 4097, 4096), (0, 64, 64), (7, 0, 64)])
def test_dx_in_slices_of_bounded_size(N, K, blocksize, dtype, monkeypatch):
    monkeypatch.setitem(module.SLICE_BYTES, "cpu", 20_000)
    sizes, dequantize = [], module.nf4_dequantize_out
    monkeypatch.setattr(module, "nf4_dequantize_out", lambda w, out: (sizes.append(out.numel()), dequantize(w, out)))
    w, dy = make(N, K, blocksize=blocksize) if N and K else nf4_quantize(torch.zeros(N, K)), torch.randn(9, N).to(dtype)
    d = nf4_dequantize(w)
    assert_accurate(matmul_weight(dy, w), (dy.double() @ d.double()).to(dtype), dy.double() @ d.double())
    assert not sizes or max(sizes) <= max(20_000 // 2, N * blocksize)
    assert len(sizes) > 1 or N * K < 20_000


@pytest.mark.parametrize("M", [1, 3, 20])
def test_rows_and_columns_of_a_weight_are_views(M, isa):
    w, (x, b) = make(50, 320, torch.bfloat16), inputs(M, 50, 320, torch.bfloat16)
    want = nf4_linear(x, w, b, isa=isa)
    for start, stop in ((0, 1), (7, 12), (13, 50)):
        rows = w._replace(codes=w.codes[start:stop], absmax=w.absmax[start:stop])
        assert torch.equal(nf4_linear(x, rows, b[start:stop], isa=isa), want[:, start:stop])
    columns = NF4Tensor(w.codes[:, 64:160], w.absmax[:, 2:5], 192)
    assert torch.equal(nf4_linear(x[:, 128:], columns, isa=isa), linear(x[:, 128:], nf4_dequantize(w)[:, 128:], isa=isa))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tails_do_not_read_neighbours(dtype, isa):
    """Codes inside a frame of 0xff, scales and x inside a frame of NaN; the pad nibble of an odd K is anything."""
    for K, blocksize in ((1, 64), (31, 32), (33, 32), (63, 64), (65, 64), (130, 64)):
        w, (x, b) = make(6, K, blocksize=blocksize), inputs(5, 6, K, dtype)
        codes = torch.full((8, w.codes.shape[1] + 40), 255, dtype=torch.uint8)
        codes[1:-1, 3 : w.codes.shape[1] + 3] = w.codes
        if K % 2:
            codes[1:-1, w.codes.shape[1] + 2] |= 15
        absmax = torch.full((8, w.absmax.shape[1] + 2), float("nan"))
        absmax[1:-1, 1:-1] = w.absmax
        frame = torch.full((7, K + 9), float("nan"), dtype=dtype)
        frame[1:-1, 4 : K + 4] = x
        framed = NF4Tensor(codes[1:-1, 3 : w.codes.shape[1] + 3], absmax[1:-1, 1:-1], K, blocksize)
        for M in (1, 5):
            got = nf4_linear(frame[1 : M + 1, 4 : K + 4], framed, b, isa=isa)
            assert not got.isnan().any() and torch.equal(got, nf4_linear(x[:M], w, b, isa=isa)), (K, M)


def test_empty_and_non_contiguous():
    w, (x, b) = make(4, 8), inputs(6, 4, 8, torch.float32)
    assert nf4_linear(x[:0], w, b).shape == (0, 4)
    assert nf4_linear(torch.randn(2, 0, 8), w).shape == (2, 0, 4)
    assert nf4_linear(x, nf4_quantize(torch.zeros(0, 8))).shape == (6, 0)
    assert torch.equal(nf4_linear(x[:, :0], nf4_quantize(torch.zeros(4, 0)), b), b.expand(6, 4))
    assert torch.equal(nf4_linear(x[0], w, b), nf4_linear(x, w, b)[0])
    strided, bias = torch.randn(8, 6).t(), torch.randn(8)[::2]
    assert torch.equal(nf4_linear(strided, w, bias), nf4_linear(strided.contiguous(), w, bias.contiguous()))
    cube = torch.randn(3, 8, 5).transpose(1, 2)
    assert torch.equal(nf4_linear(cube, w, b), nf4_linear(cube.contiguous(), w, b))
    twisted = w._replace(codes=w.codes.t().contiguous().t(), absmax=w.absmax.t().contiguous().t())
    assert torch.equal(nf4_linear(x, twisted), nf4_linear(x, w))


@pytest.mark.parametrize("shape", [(0, 4, 8), (6, 0, 8), (6, 4, 0)])
def test_gradients_where_a_size_is_zero(shape):
    M, N, K = shape
    x, b = (t.requires_grad_() for t in inputs(M, N, K, torch.float32))
    w = nf4_quantize(torch.randn(N, K))
    dx, db = torch.autograd.grad(nf4_linear(x, w, b).sum(), (x, b))
    assert torch.equal(db, torch.full((N,), float(M))) and torch.equal(dx, nf4_dequantize(w).float().sum(0).expand(M, K))


def test_saved_tensors():
    """The codes and scales, not x; nothing where x needs no gradient."""
    w, (x, b) = make(4, 128, nested=True), inputs(5, 4, 128, torch.float32)
    y = nf4_linear(x.requires_grad_(), w, b)
    assert [tuple(t.shape) for t in y.grad_fn.saved_tensors] == [(4, 64), (4, 2)]
    y = nf4_linear(x.detach(), w, b.requires_grad_())
    assert [t for t in y.grad_fn.saved_tensors if t is not None] == []


def test_results_and_gradients_are_bitwise_repeatable():
    w, (x, b) = make(40, 130), (t.requires_grad_() for t in inputs(70, 40, 130, torch.float32))
    y = nf4_linear(x, w, b)
    assert torch.equal(y, nf4_linear(x, w, b))
    first, second = (torch.autograd.grad(y.sum(), (x, b), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradient_of_the_gradient():
    w, args = make(4, 70), [t.requires_grad_() for t in inputs(3, 4, 70, torch.float64)]
    assert torch.autograd.gradcheck(lambda x, b: nf4_linear(x, w, b), args)
    assert torch.autograd.gradgradcheck(lambda x, b: nf4_linear(x, w, b), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_and_compile(dtype):
    w, (x, b) = make(6, 130, dtype), (t.requires_grad_() for t in inputs(4, 6, 130, dtype))
    torch.library.opcheck(torch.ops.swiftk.nf4_linear_fwd.default, (x, w.codes, w.absmax, b, 130, 64, "auto", "auto"))
    torch.library.opcheck(torch.ops.swiftk.nf4_linear_fwd.default, (x, w.codes, w.absmax, None, 130, 64, "auto", "auto"))
    dy = torch.randn(4, 6).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.swiftk.nf4_linear_bwd.default, (dy, w.codes, w.absmax, 130, 64))
    for now in (w, nf4_quantize(torch.randn(6, 130), nested=True)):
        compiled = torch.compile(lambda x, b, w=now: nf4_linear(x, w, b), fullgraph=True, backend="aot_eager")
        grads = [
            torch.autograd.grad(f(x, b).square().sum(), (x, b)) for f in (compiled, lambda x, b, w=now: nf4_linear(x, w, b))
        ]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- the CUDA kernel for few rows, lane after lane on the CPU --------------------------------------------------------
# Which element meets which, and what is written where; the sums within an instruction are the hardware's (tests/gpu).


def as_on_gpu(x: torch.Tensor, *products: Product) -> None:
    args, _alive = module.few_rows_args(x, products)
    native().nf4_linear_as_on_gpu(*args)


def product(M, w, bias=None, dtype=torch.float32, **options) -> Product:
    return Product(w, bias, torch.full((M, w.shape[0]), float("nan"), dtype=dtype), **options)


@pytest.mark.parametrize(
    ("N", "K", "blocksize", "source", "nested"),
    [
        (1, 1, 64, torch.bfloat16, False), (16, 256, 64, torch.bfloat16, False), (17, 333, 64, torch.float32, False),
        (40, 2080, 32, torch.bfloat16, False), (33, 4500, 256, torch.float32, False), (5, 2400, 4096, torch.bfloat16, False),
        (35, 321, 32, torch.float32, True), (20, 640, 64, torch.float32, True),
    ],
)  # fmt: skip
def test_values_as_on_a_gpu(N, K, blocksize, source, nested):
    """Every tile of rows, several chunks a warp and fewer than one; unrounded sums against fp64, and the same for any M."""
    w = make(N, K, source, blocksize=blocksize, nested=nested)
    x, _ = inputs(70, N, K, torch.bfloat16)
    exact, plain = nf4_linear_ref(x.double(), w), F.linear(x.float(), nf4_dequantize(w).float())
    whole = product(70, w)
    as_on_gpu(x, whole)
    assert_accurate(whole.y, plain, exact)
    for M in (1, 2, 8, 9, 16, 17, 33, 64):
        part, narrow = product(M, w), product(M, w, dtype=torch.bfloat16)
        as_on_gpu(x[:M], part)
        as_on_gpu(x[:M], narrow)
        assert torch.equal(part.y, whole.y[:M]) and torch.equal(narrow.y, part.y.bfloat16()), M


def test_each_element_meets_its_own_as_on_a_gpu():
    """One-hot rows of x: y is the weight itself, exactly."""
    w = make(19, 600, torch.bfloat16)
    for start in range(0, 600, 60):
        x = torch.eye(600, dtype=torch.bfloat16)[start : start + 60]
        p = product(60, w, dtype=torch.bfloat16)
        as_on_gpu(x, p)
        assert torch.equal(p.y, nf4_dequantize(w).t()[start : start + 60])


@pytest.mark.parametrize("rank", [0, 1, 19])
def test_tail_scale_and_bias_as_on_a_gpu(rank):
    w, (x, b) = make(21, 300, torch.bfloat16), inputs(12, 21, 300, torch.bfloat16)
    tail = tuple(torch.randn(n, rank).bfloat16() for n in (12, 21)) if rank else None
    scale = torch.randn(21)
    for dtype in (torch.float32, torch.bfloat16):
        p = product(12, w, b, dtype, tail=tail, scale=scale)
        as_on_gpu(x, p)
        wide = None if tail is None else tuple(t.double() for t in tail)
        exact = linear_ref(x.double(), nf4_dequantize(w).double(), b.double(), tail=wide, scale=scale.double())
        plain = linear_ref(x.float(), nf4_dequantize(w).float(), b.float(), tail=tail, scale=scale).to(dtype)
        assert_accurate(p.y, plain, exact)


def test_a_group_equals_its_products_as_on_a_gpu():
    x, _ = inputs(11, 1, 200, torch.bfloat16)
    weights = [make(N, 200, blocksize=size, nested=nested) for N, size, nested in
               ((40, 64, False), (3, 32, True), (32, 128, False), (16, 64, True))]  # fmt: skip
    group = [product(11, w, inputs(1, w.shape[0], 1, torch.bfloat16)[1]) for w in weights]
    as_on_gpu(x, *group)
    for p in group:
        alone = p._replace(y=torch.full_like(p.y, float("nan")))
        as_on_gpu(x, alone)
        assert torch.equal(p.y, alone.y) and not p.y.isnan().any()


def test_frames_as_on_a_gpu():
    """x and y in frames of NaN, codes in one of 0xff, at addresses that no vector divides and at some that it does."""
    for K, blocksize, left in ((1, 64, 1), (33, 32, 2), (63, 64, 4), (130, 64, 8), (512, 64, 16), (515, 64, 16), (512, 64, 3)):
        w, (x, b) = make(18, K, blocksize=blocksize), inputs(10, 18, K, torch.bfloat16)
        codes = torch.full((20, w.codes.shape[1] + 64), 255, dtype=torch.uint8)
        codes[1:-1, left : left + w.codes.shape[1]] = w.codes
        if K % 2:
            codes[1:-1, left + w.codes.shape[1] - 1] |= 15
        absmax = torch.full((20, w.absmax.shape[1] + 2), float("nan"))
        absmax[1:-1, 1:-1] = w.absmax
        framed = NF4Tensor(codes[1:-1, left : left + w.codes.shape[1]], absmax[1:-1, 1:-1], K, blocksize)
        outer, out = (torch.full((12, n + 32), float("nan"), dtype=torch.bfloat16) for n in (K, 18))
        outer[1:-1, left : left + K] = x
        want, got = product(10, w, b, torch.bfloat16), Product(framed, b, out[1:-1, left : left + 18])
        as_on_gpu(x, want)
        as_on_gpu(outer[1:-1, left : left + K], got)
        assert not want.y.isnan().any() and torch.equal(got.y, want.y), K
        out[1:-1, left : left + 18] = float("nan")
        assert out.isnan().all()


@pytest.mark.parametrize(("M", "dtype"), [(6, torch.bfloat16), (70, torch.bfloat16), (6, torch.float32), (3, torch.float64)])
def test_the_launcher_of_cuda_on_the_host(M, dtype, monkeypatch):
    """Few rows in launches of at most four products; more rows, and wide ones, by slices of rows of the dequantised weight."""
    host = SimpleNamespace(nf4_linear=native().nf4_linear_as_on_gpu, nf4_dequantize=native().nf4_dequantize_as_on_gpu)
    for file in (module, nf4):
        monkeypatch.setattr(file, "native_cuda", lambda: host)
        monkeypatch.setattr(file, "on_stream", lambda f, device, *args: f(*args))
    monkeypatch.setattr(module, "nf4_dequantize_out", nf4._dequantize_on_cuda)
    monkeypatch.setitem(module.SLICE_BYTES, "cuda", 10_000)
    x, s, group = *(torch.randn(M, n).to(dtype) for n in (203, 3)), []
    for N, nested in ((40, False), (17, True), (3, False), (64, False), (9, True)):
        w, (_, b) = make(N, 203, nested=nested), inputs(1, N, 1, dtype)
        tail, scale = (s, torch.randn(N, 3).to(dtype)), torch.randn(N, dtype=acc_dtype(dtype))
        group.append(product(M, w, b, dtype, tail=tail, scale=scale))
    module._group_on_cuda(x, group, "auto")
    for p in group:
        d, (u, t) = nf4_dequantize(p.weight), p.tail
        exact, plain = (
            linear_ref(x.to(wide), d.to(wide), p.bias.to(wide), tail=(u.to(wide), t.to(wide)), scale=p.scale.to(wide))
            for wide in (torch.float64, acc_dtype(dtype))
        )
        assert_accurate(p.y, plain.to(dtype), exact)


def dx_as_on_gpu(dy: torch.Tensor, w: NF4Tensor) -> torch.Tensor:
    """Partial sums (splits, M, K)."""
    args, partials, _alive = module.few_rows_dx_args(dy, w)
    native().nf4_linear_dx_as_on_gpu(*args)
    return partials


@pytest.mark.parametrize(
    ("N", "K", "blocksize", "nested"),
    [
        (1, 1, 64, False), (16, 128, 64, False), (19, 131, 32, False), (300, 257, 64, False), (130, 40, 64, True),
        (263, 600, 256, False), (0, 8, 64, False), (8, 0, 64, False),
    ],
)  # fmt: skip
def test_dx_as_on_a_gpu(N, K, blocksize, nested, monkeypatch):
    """One split and several, fewer rows than warps, columns past one block of threads; a row is the same for any M."""
    w = make(N, K, blocksize=blocksize, nested=nested) if N and K else nf4_quantize(torch.zeros(N, K))
    d, dy = nf4_dequantize(w), torch.randn(20, N).bfloat16()
    for blocks in (1, 264):
        monkeypatch.setattr(module, "BLOCKS", blocks)
        whole = dx_as_on_gpu(dy, w)
        assert (len(whole) > 1) == (blocks > 1 and N > 128)
        assert_accurate(whole.sum(0), dy.float() @ d.float(), dy.double() @ d.double())
        for M in (1, 8, 9):
            assert torch.equal(dx_as_on_gpu(dy[:M], w), whole[:, :M])


def test_each_dx_meets_its_own_as_on_a_gpu():
    """One-hot rows of dy, at addresses that no vector divides too: dx is the weight itself, exactly."""
    w = make(150, 333, torch.bfloat16)
    for left in (0, 1):
        dy = torch.full((150, 160), float("nan")).bfloat16()
        dy[:, left : left + 150] = torch.eye(150)
        assert torch.equal(dx_as_on_gpu(dy[:, left : left + 150], w).sum(0).bfloat16(), nf4_dequantize(w))
    columns = NF4Tensor(w.codes[:, 32:], w.absmax[:, 1:], 333 - 64)
    assert torch.equal(dx_as_on_gpu(torch.eye(150).bfloat16(), columns).sum(0).bfloat16(), nf4_dequantize(w)[:, 64:])


def test_sizes_of_zero_as_on_a_gpu():
    w, b = nf4_quantize(torch.zeros(4, 0)), torch.randn(4).bfloat16()
    p = product(3, w, b, torch.bfloat16)
    as_on_gpu(torch.zeros(3, 0, dtype=torch.bfloat16), p)
    assert torch.equal(p.y, b.expand(3, 4))
    as_on_gpu(torch.zeros(3, 8, dtype=torch.bfloat16), product(3, nf4_quantize(torch.zeros(0, 8))), product(3, make(2, 8)))


W = NF4Tensor(torch.zeros(3, 32, dtype=torch.uint8), torch.ones(3, 1), 64)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.randn(2, 60), W), r"nf4_linear: w has shape \(3, 64\), x \(2, 60\) needs \(N, 60\)"),
        ((torch.tensor(1.0), W), r"nf4_linear: x has shape \(\), wants \(..., K\)"),
        ((torch.randn(2, 64), W, torch.ones(4)), r"nf4_linear: bias has shape \(4,\), w \(3, 64\) needs \(3,\)"),
        ((torch.randn(2, 64), W, torch.ones(3).bfloat16()), "nf4_linear: bias has dtype torch.bfloat16, wants"),
        ((torch.randn(2, 64).half(), W), "nf4_linear: x has dtype torch.float16, wants torch.bfloat16"),
        ((torch.randn(2, 64, device="meta"), W), "nf4_linear: w has device cpu, wants meta like x"),
        ((torch.randn(2, 64), torch.randn(3, 64)), "w has type Tensor, wants an NF4Tensor; make one with nf4_quantize"),
        ((torch.randn(2, 64), W._replace(codes=W.codes[None], absmax=W.absmax[None])),
         r"has shape \(1, 3, 64\), wants \(N, K\)"),
        ((torch.randn(2, 64), W._replace(absmax=torch.ones(3, 2))), r"nf4_linear: absmax has shape \(3, 2\)"),
    ],
)  # fmt: skip
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        nf4_linear(*args)
    with pytest.raises(ValueError, match="nf4_linear: numerics has 'exact', wants one of auto, invariant"):
        nf4_linear(torch.randn(2, 64), W, numerics="exact")
    with pytest.raises(ValueError, match="nf4_linear: isa has 'sse9', wants one of"):
        nf4_linear(torch.randn(2, 64), W, isa="sse9")
