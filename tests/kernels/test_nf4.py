"""nf4: byte for byte against exact arithmetic and the reference, slices, bitsandbytes, operator contracts, errors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from swiftk.kernels._native import DTYPE_CODES, native
from swiftk.kernels.nf4 import (
    BLOCKSIZES,
    VALUES,
    Nested,
    NF4Tensor,
    dynamic_map,
    nf4_dequantize,
    nf4_dequantize_out,
    nf4_dequantize_ref,
    nf4_from_bitsandbytes,
    nf4_quantize,
    nf4_quantize_ref,
    nf4_to_bitsandbytes,
    scale_args,
)
from tests.kernels import nf4_golden

GOLDEN = json.loads(Path(__file__).with_name("nf4_golden.json").read_text())
CASES = [pytest.param(case, id=case["name"]) for case in GOLDEN["cases"]]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
THRESHOLDS = (torch.tensor(VALUES)[1:] + torch.tensor(VALUES)[:-1]) / 2


def bits(t: torch.Tensor) -> str:
    """Big-endian hexadecimal digits of every element."""
    size = t.element_size()
    return t.contiguous().flatten().view(torch.uint8).view(-1, size).flip(1).numpy().tobytes().hex()


def fp32(digits: str) -> torch.Tensor:
    octets = torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)
    return octets.view(-1, 4).flip(1).contiguous().view(torch.float32).flatten()


def same(a: NF4Tensor, b: NF4Tensor) -> bool:
    """Equal bytes: torch.equal takes -0 for 0."""
    return torch.equal(a.codes, b.codes) and bits(a.absmax_fp32()) == bits(b.absmax_fp32()) and a[2:4] == b[2:4]


def reference(weight: torch.Tensor, blocksize: int = 64) -> NF4Tensor:
    return NF4Tensor(*nf4_quantize_ref(weight, blocksize), weight.shape[-1], blocksize)


def source(case: dict) -> torch.Tensor:
    digits = case["source"]
    if isinstance(digits, dict):
        rows, columns = case["shape"]
        digits = "".join(f"{u:08x}" for u in nf4_golden.draw(digits["seed"], rows * columns, case["dtype"]))
    x = fp32(digits).view(case["shape"])
    return x.bfloat16() if case["dtype"] == "bf16" else x


def assert_golden(case, w, narrow, wide):
    assert bits(w.codes) == case["codes"]
    assert bits(w.absmax_fp32()) == case["absmax"]
    for name, digits in (("bf16", bits(narrow)), ("fp32", bits(wide))):
        if name in case:
            assert digits == case[name]
        else:
            assert hashlib.sha256(digits.encode()).hexdigest() == case[f"{name}_sha256"]


@pytest.mark.parametrize("case", CASES)
def test_golden(case, isa):
    for x in (source(case), source(case).double()):
        w = nf4_quantize(x, blocksize=case["blocksize"], isa=isa)
        assert w.absmax.dtype == (torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)
        assert_golden(case, w, nf4_dequantize(w, isa=isa), nf4_dequantize(w, torch.float32, isa=isa))


@pytest.mark.parametrize("case", CASES)
def test_golden_reference(case):
    w = reference(source(case), case["blocksize"])
    assert_golden(case, w, nf4_dequantize_ref(w), nf4_dequantize_ref(w, torch.float32))


def test_golden_nested():
    (case,) = (c for c in GOLDEN["cases"] if "nested" in c)
    w, want = nf4_quantize(source(case), blocksize=case["blocksize"], nested=True), case["nested"]
    assert w.nested is not None and bits(w.nested.code_map) == GOLDEN["dynamic_map"]
    assert bits(w.codes) == case["codes"] and bits(w.absmax) == want["codes"]
    assert bits(w.nested.absmax) == want["absmax"] and bits(w.nested.offset) == want["offset"]
    assert bits(w.absmax_fp32()) == want["decoded"]


def test_the_golden_file_is_what_its_generator_writes():
    assert [json.loads(json.dumps(case)) for case in nf4_golden.cases()] == GOLDEN["cases"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_equals_the_reference_byte_for_byte(blocksize, dtype, isa, thread_count):
    """Tails of every length modulo 32 and 64, odd K, several blocks."""
    for K in {1, 2, 31, 33, 64, 65, 96, 127, blocksize - 1, blocksize + 1, 2 * blocksize, 2 * blocksize + 39}:
        x = torch.randn(5, K, dtype=torch.float64).to(dtype)
        want = reference(x, blocksize)
        w = thread_count(2, lambda x=x: nf4_quantize(x, blocksize=blocksize, isa=isa))
        assert same(w, want), K
        for out in (torch.bfloat16, torch.float32):
            y = nf4_dequantize(w, out, isa=isa)
            assert y.dtype == out and bits(y) == bits(nf4_dequantize_ref(want, out)), K


def test_many_threads_and_rows(isa, thread_count):
    x = torch.randn(301, 777)
    want = reference(x)
    for threads in (1, 2, 3):
        w = thread_count(threads, lambda: nf4_quantize(x, isa=isa))
        assert same(w, want)
        assert bits(thread_count(threads, lambda w=w: nf4_dequantize(w, isa=isa))) == bits(nf4_dequantize_ref(want))


def test_values_on_and_around_thresholds(isa):
    """x = t absmax and its neighbours, for absmax of every exponent and random significands."""
    exponents = torch.arange(-126, 128).repeat(3)
    absmax = torch.ldexp(1 + torch.randint(0, 2**23, exponents.shape) / 2**23, exponents)
    x = (THRESHOLDS * absmax[:, None]).repeat(1, 4)
    for i in range(1, 4):
        x[:, 15 * i :] = torch.nextafter(x[:, 15 * i :], torch.full((), float("inf") if i % 2 else float("-inf")))
    x = torch.cat([absmax[:, None], x, -absmax[:, None]], 1)
    assert x.isfinite().all()
    assert same(nf4_quantize(x, isa=isa), reference(x))
    assert same(nf4_quantize(x.bfloat16(), isa=isa), reference(x.bfloat16()))


def test_blocks_of_zeros_subnormals_and_huge_values(isa):
    tiny = torch.finfo(torch.float32).tiny
    for scale in (0.0, -0.0, tiny / 4, tiny, 2.0**126, 2.0**127):
        x = torch.randn(3, 150).clamp(-1.9, 1.9) * scale
        w = nf4_quantize(x, isa=isa)
        assert same(w, reference(x))
        assert bits(nf4_dequantize(w, isa=isa)) == bits(nf4_dequantize_ref(w))
    w = nf4_quantize(torch.full((2, 70), -tiny / 2), isa=isa)
    assert (w.codes == 0x77).all() and bits(w.absmax) == 4 * "00000000" and bits(nf4_dequantize(w)) == 140 * "0000"


def test_a_code_0_block_of_zeros_gives_negative_zeros(isa):
    """What bitsandbytes makes of zeros on CUDA; kept."""
    w = NF4Tensor(torch.zeros(1, 32, dtype=torch.uint8), torch.zeros(1, 1), 64)
    assert bits(nf4_dequantize(w, isa=isa)) == 64 * "8000"


def test_every_code_of_many_absmax(isa):
    """All 256 bytes against 200 absmax, some with subnormal or infinite bf16 products."""
    absmax = torch.cat([torch.randn(100).abs(), torch.logspace(-44, 38.53, 100, dtype=torch.float64).float()])[:, None]
    codes = torch.arange(256, dtype=torch.uint8).repeat(200, 1)
    for blocksize, columns in ((512, 512), (512, 511)):
        for a in (absmax, absmax.bfloat16()):
            w = NF4Tensor(codes, a, columns, blocksize)
            for dtype in (torch.bfloat16, torch.float32):
                assert bits(nf4_dequantize(w, dtype, isa=isa)) == bits(nf4_dequantize_ref(w, dtype))


def test_every_bf16_absmax(isa):
    """All 32,640 finite ones, which a kernel may look up, with every code; and -1, which no quantiser makes."""
    absmax = torch.cat([torch.arange(0x7F80), torch.tensor([0xBF80])]).to(torch.uint16).view(torch.bfloat16)[:, None]
    codes = torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 4, dtype=torch.uint8).expand(len(absmax), 32)
    w = NF4Tensor(codes, absmax, 64)
    assert bits(nf4_dequantize(w, isa=isa)) == bits(nf4_dequantize_ref(w))


def test_bf16_absmax_is_exact():
    x = torch.randn(40, 200).bfloat16()
    narrow, wide = nf4_quantize(x), nf4_quantize(x, absmax_dtype=torch.float32)
    assert (narrow.absmax.dtype, wide.absmax.dtype) == (torch.bfloat16, torch.float32)
    assert same(narrow, wide) and torch.equal(nf4_dequantize(narrow), nf4_dequantize(wide))


def test_a_slice_of_the_weight_is_a_slice_of_the_parts(isa):
    x = torch.randn(4, 10, 320)
    w = nf4_quantize(x, isa=isa)
    assert w.shape == x.shape and w.device == x.device
    whole = nf4_dequantize(w, isa=isa)
    assert same(NF4Tensor(w.codes[2], w.absmax[2], 320), nf4_quantize(x[2], isa=isa))
    for a, b in ((0, 128), (64, 320), (192, 300)):
        part = NF4Tensor(w.codes[..., a // 2 : -(-b // 2)], w.absmax[..., a // 64 : -(-b // 64)], b - a)
        assert torch.equal(nf4_dequantize(part, isa=isa), whole[..., a:b])
        one = NF4Tensor(part.codes[1], part.absmax[1], b - a)
        assert torch.equal(nf4_dequantize(one, isa=isa), whole[1, :, a:b])
        assert torch.equal(nf4_dequantize(NF4Tensor(one.codes[3:7], one.absmax[3:7], b - a), isa=isa), whole[1, 3:7, a:b])


@pytest.mark.parametrize("K", [1, 33, 63, 64, 100, 4097])
def test_out_launcher_writes_its_rows_and_nothing_else(K, isa):
    w = nf4_quantize(torch.randn(6, K))
    for dtype in (torch.bfloat16, torch.float32):
        frame = torch.full((8, K + 9), float("nan"), dtype=dtype)
        nf4_dequantize_out(w, frame[1:7, 5 : K + 5], isa)
        assert torch.equal(frame[1:7, 5 : K + 5], nf4_dequantize_ref(w, dtype))
        frame[1:7, 5 : K + 5] = float("nan")
        assert frame.isnan().all()


def test_tails_do_not_read_neighbours(isa):
    """Sources and codes inside frames: a NaN beside the source is no error, other codes beside the codes change nothing."""
    for K in (1, 5, 31, 33, 95):
        x = torch.full((6, K + 9), float("nan"))
        x[1:-1, 4 : K + 4] = torch.randn(4, K)
        w = nf4_quantize(x[1:-1, 4 : K + 4], isa=isa)
        assert same(w, reference(x[1:-1, 4 : K + 4]))
        codes = torch.full((6, w.codes.shape[1] + 5), 0xFF, dtype=torch.uint8)
        codes[1:-1, 2:-3] = w.codes
        if K % 2:
            codes[1:-1, -4] |= 0xF  # the pad nibble does not matter
        assert torch.equal(nf4_dequantize(NF4Tensor(codes[1:-1, 2:-3], w.absmax, K), isa=isa), nf4_dequantize_ref(w))


@pytest.mark.parametrize(("N", "K"), [(1152, 4304), (512, 4096), (515, 4128)])
def test_outputs_of_either_size(N, K, isa):
    """9.9 MB with rows that no vector divides, exactly 4 MiB, and just above: past the caches, with a tail of 32."""
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    w = NF4Tensor(codes, torch.rand(N, -(-K // 64)), K)
    assert torch.equal(nf4_dequantize(w, isa=isa), nf4_dequantize_ref(w))


def test_empty_and_non_contiguous():
    x = torch.randn(6, 96)
    for shape in ((0, 96), (6, 0), (0, 0), (2, 0, 96), (0, 3, 5)):
        for nested in (False, True):
            w = nf4_quantize(torch.empty(shape), nested=nested)
            assert w.shape == shape and w.codes.shape == (*shape[:-1], -(-shape[-1] // 2))
            assert nf4_dequantize(w).shape == shape
    assert same(nf4_quantize(x.t().contiguous().t()), nf4_quantize(x))
    assert same(nf4_quantize(x[:, ::2]), nf4_quantize(x[:, ::2].contiguous()))
    assert same(nf4_quantize(x[:1].expand(4, 96)), nf4_quantize(x[:1].repeat(4, 1)))
    cube = torch.randn(5, 3, 70)
    assert same(nf4_quantize(cube.transpose(0, 1)), nf4_quantize(cube.transpose(0, 1).contiguous()))
    stack = nf4_quantize(cube)
    for e in range(5):
        assert same(NF4Tensor(stack.codes[e], stack.absmax[e], 70), nf4_quantize(cube[e]))
    strided = NF4Tensor(stack.codes.transpose(0, 1), stack.absmax.transpose(0, 1), 70)
    assert torch.equal(nf4_dequantize(strided), nf4_dequantize(stack).transpose(0, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(dtype, value, isa):
    x = torch.randn(9, 150).to(dtype)
    x[7, 149] = value
    with pytest.raises(ValueError, match=r"nf4_quantize: weight has NaN or infinity in row 7, block 2 \(columns 128 to 149\)"):
        nf4_quantize(x, isa=isa)
    x[4, 70] = value  # the first one is named
    with pytest.raises(ValueError, match=r"row 4, block 1 \(columns 64 to 127\)"):
        nf4_quantize(x, isa=isa)
    with pytest.raises(ValueError, match="matrix 1, row 1, block 1"):
        nf4_quantize(x.view(3, 3, 150), isa=isa)
    if dtype == torch.float64:
        x = torch.full((1, 3), 1e39, dtype=dtype)
        with pytest.raises(ValueError, match=r"row 0, block 0 .* wants finite values in fp32"):
            nf4_quantize(x, isa=isa)


def test_nested():
    x = torch.randn(100, 640)
    plain, nested = nf4_quantize(x), nf4_quantize(x, nested=True)
    assert nested.absmax.dtype == torch.uint8 and torch.equal(nested.codes, plain.codes)
    error = (nested.absmax_fp32() - plain.absmax).abs().max() / (plain.absmax - plain.absmax.mean()).abs().max()
    assert error <= (dynamic_map()[1:] - dynamic_map()[:-1]).max() / 2 * 1.0001
    decoded = NF4Tensor(plain.codes, nested.absmax_fp32(), 640)
    assert torch.equal(nf4_dequantize(nested), nf4_dequantize(decoded))
    out = torch.empty(100, 640, dtype=torch.bfloat16)
    nf4_dequantize_out(nested, out)
    assert torch.equal(out, nf4_dequantize(decoded))
    constant = nf4_quantize(torch.ones(3, 64), nested=True)  # every absmax equals the offset
    assert (nf4_dequantize(constant) == 1).all()


def test_dynamic_map_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        ours, theirs = dynamic_map(signed), functional.create_dynamic_map(signed)
        assert (ours[1:] > ours[:-1]).all() and torch.allclose(ours, theirs, rtol=3e-7, atol=0)


# --- the CUDA kernels, thread after thread on the CPU ----------------------------------------------------------------
# What they compute, not that they run: the conversions of a GPU are its own, tests/gpu has those.


def quantize_as_on_gpu(x: torch.Tensor, blocksize: int = 64) -> tuple[NF4Tensor, int]:
    """The weight, and the first block that is not finite."""
    (N, K), narrow = x.shape, x.dtype == torch.bfloat16
    w = NF4Tensor(
        torch.full((N, -(-K // 2)), 0x5A, dtype=torch.uint8),
        torch.full((N, -(-K // blocksize)), float("nan"), dtype=torch.bfloat16 if narrow else torch.float32), K, blocksize,
    )  # fmt: skip
    bad = native().nf4_quantize_as_on_gpu(
        DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), N, K, blocksize, w.codes.data_ptr(), narrow, w.absmax.data_ptr()
    )
    return w, bad


def dequantize_as_on_gpu(w: NF4Tensor, dtype: torch.dtype = torch.bfloat16, out: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full(w.shape, float("nan"), dtype=dtype) if out is None else out
    scales, _alive = scale_args(w)
    native().nf4_dequantize_as_on_gpu(
        w.codes.data_ptr(), w.codes.stride(0), scales, *out.shape, w.blocksize, out.dtype == torch.float32, out.data_ptr(),
        out.stride(0),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("case", CASES)
def test_golden_as_on_a_gpu(case):
    for x in (source(case), source(case).double()):
        w, bad = quantize_as_on_gpu(x, case["blocksize"])
        assert bad == -1
        assert_golden(case, w, dequantize_as_on_gpu(w), dequantize_as_on_gpu(w, torch.float32))
    if "nested" in case:
        w = nf4_quantize(source(case), blocksize=case["blocksize"], nested=True)
        for dtype in (torch.bfloat16, torch.float32):
            assert bits(dequantize_as_on_gpu(w, dtype)) == bits(nf4_dequantize(w, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
def test_shapes_as_on_a_gpu(blocksize, dtype):
    """Rows in fours and a rest, columns in several blocks of threads, tails of each length modulo 8."""
    for N, K in ((1, 1), (3, 7), (4, 62), (5, 2048), (2, 2055), (6, 4129), (0, 5), (5, 0), *((2, 64 + k) for k in range(8))):
        x = torch.randn(N, K, dtype=torch.float64).to(dtype)
        (w, bad), want = quantize_as_on_gpu(x, blocksize), nf4_quantize(x, blocksize=blocksize)
        assert bad == -1 and same(w, want), K
        for out in (torch.bfloat16, torch.float32):
            assert bits(dequantize_as_on_gpu(w, out)) == bits(nf4_dequantize(want, out)), (N, K)


def test_values_around_thresholds_as_on_a_gpu():
    exponents = torch.arange(-126, 128)
    absmax = torch.ldexp(1 + torch.randint(0, 2**23, exponents.shape) / 2**23, exponents)
    x = (THRESHOLDS * absmax[:, None]).repeat(1, 3)
    x[:, 15:30] = torch.nextafter(x[:, 15:30], torch.tensor(float("inf")))
    x[:, 30:] = torch.nextafter(x[:, 30:], torch.tensor(float("-inf")))
    tiny = torch.finfo(torch.float32).tiny
    scales = torch.tensor([0.0, tiny / 4, tiny, 2.0**126, 2.0**127])[:, None]
    for y in (torch.cat([absmax[:, None], x], 1), torch.randn(5, 46).clamp(-1.9, 1.9) * scales):
        for source_of in (y, y.bfloat16()):
            assert same(quantize_as_on_gpu(source_of)[0], reference(source_of))


@pytest.mark.parametrize("K", [1, 33, 64, 100, 2049])
def test_frames_as_on_a_gpu(K):
    """Addresses that no vector divides, neighbours that must be neither read nor written, any pad nibble."""
    for left in (1, 2, 4, 8):
        frame = torch.full((6, K + 16), float("nan"))
        frame[1:-1, left : left + K] = torch.randn(4, K)
        w, bad = quantize_as_on_gpu(frame[1:-1, left : left + K])
        assert bad == -1 and same(w, reference(frame[1:-1, left : left + K]))
        codes = torch.full((4, w.codes.shape[1] + 16), 255, dtype=torch.uint8)
        codes[:, left : left + w.codes.shape[1]] = w.codes
        if K % 2:
            codes[:, left + w.codes.shape[1] - 1] |= 15
        part = w._replace(codes=codes[:, left : left + w.codes.shape[1]])
        for dtype in (torch.bfloat16, torch.float32):
            out = torch.full((6, K + 16), float("nan"), dtype=dtype)
            assert torch.equal(dequantize_as_on_gpu(part, out=out[1:-1, left : left + K]), nf4_dequantize_ref(w, dtype))
            out[1:-1, left : left + K] = float("nan")
            assert out.isnan().all()


def test_every_code_of_many_absmax_as_on_a_gpu():
    """Both look-ups: of single values times absmax, and of bytes of the block's 16 rounded values."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 4)
    codes[:, 1:] = torch.randint(0, 256, (256, 3), dtype=torch.uint8)
    logs = torch.logspace(-44, 38.53, 200, dtype=torch.float64).float()
    for absmax in [*torch.randn(50).abs(), *logs, torch.tensor(2.0**127), torch.tensor(0.0)]:
        want = bits(nf4_dequantize_ref(NF4Tensor(codes.view(1, -1), absmax.view(1, 1), 2048, 2048)))
        assert bits(dequantize_as_on_gpu(NF4Tensor(codes.view(1, -1), absmax.view(1, 1), 2048, 2048))) == want
        out = torch.empty(2048, dtype=torch.bfloat16)
        native().nf4_decode_as_on_gpu(codes.data_ptr(), 256, float(absmax), out.data_ptr())
        assert bits(out) == want


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_as_on_a_gpu(dtype):
    """The first such block is found; each has absmax NaN, so that nothing computed from it looks like a number."""
    for value in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(9, 150).to(dtype)
        x[7, 149], x[4, 70] = value, value
        w, bad = quantize_as_on_gpu(x)
        assert divmod(bad, 3) == (4, 1)
        assert w.absmax.isnan().nonzero().tolist() == [[4, 1], [7, 2]]
        assert dequantize_as_on_gpu(w)[4, 64:128].isnan().all()


# --- bitsandbytes ------------------------------------------------------------------------------------------------


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


def saved(bnb, x: torch.Tensor, nested: bool, blocksize: int = 64) -> dict[str, torch.Tensor]:
    """The state dict of a Linear4bit that holds x."""
    layer = bnb.nn.Linear4bit(x.shape[1], x.shape[0], bias=False, quant_type="nf4", compute_dtype=x.dtype, device="meta")
    layer.weight = bnb.nn.Params4bit(x.clone(), quant_type="nf4", compress_statistics=nested, blocksize=blocksize, module=layer)
    return layer.to("cpu").state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
def test_against_bitsandbytes(blocksize, dtype, bnb):
    """absmax exact, every code that differs within 4 ulp of a threshold."""
    x = torch.randn(24, 4096).to(dtype)
    theirs, ours = nf4_from_bitsandbytes(saved(bnb, x, False, blocksize)), nf4_quantize(x, blocksize=blocksize)
    assert bits(theirs.absmax) == bits(ours.absmax_fp32())
    v = (x.float().unflatten(1, (-1, blocksize)) * (1 / ours.absmax.float())[..., None]).flatten(1)
    distance = (v[..., None] - THRESHOLDS).abs().min(-1).values / v.abs() / torch.finfo(torch.float32).eps
    nibbles = [torch.stack((w.codes >> 4, w.codes & 15), -1).flatten(1) for w in (theirs, ours)]
    differ = nibbles[0] != nibbles[1]
    assert (distance[differ] <= 4).all() and differ.float().mean() < 1e-3
    dequantised = bnb.functional.dequantize_4bit(*quant_state(bnb, ours, torch.float32))
    assert torch.equal(dequantised, nf4_dequantize(ours, torch.float32))


def quant_state(bnb, w: NF4Tensor, dtype):
    state = nf4_to_bitsandbytes(w, dtype)
    parts = {k.removeprefix("weight."): v for k, v in state.items() if k != "weight"}
    return state["weight"], bnb.functional.QuantState.from_dict(parts, device=torch.device("cpu"))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_dict_round_trip(dtype, nested, bnb):
    """Theirs -> ours -> theirs, byte for byte; and ours is what Linear4bit computes with."""
    x = torch.randn(48, 704).to(dtype)
    state = saved(bnb, x, nested)
    w = nf4_from_bitsandbytes(state)
    again = nf4_to_bitsandbytes(w, dtype)
    assert set(again) == set(state)
    for key, value in state.items():
        if "quant_state" in key:
            ours, theirs = (json.loads(bytes(t.tolist())) for t in (again[key], value))
            assert ours == theirs
        else:
            assert value.dtype == again[key].dtype and bits(value) == bits(again[key]) and value.shape == again[key].shape, key
    prefixed = {f"model.layers.0.{k}": v for k, v in again.items()}
    assert same(nf4_from_bitsandbytes(prefixed, "model.layers.0.weight"), w)
    packed, their_state = quant_state(bnb, w, dtype)
    theirs = bnb.functional.dequantize_4bit(packed, their_state)
    assert torch.equal(theirs, nf4_dequantize(w, torch.float32).to(dtype))


@pytest.mark.parametrize("nested", [False, True])
def test_ours_loads_into_linear4bit(nested, bnb):
    x = torch.randn(32, 128).bfloat16()
    w = nf4_quantize(x, nested=nested)
    state = nf4_to_bitsandbytes(w, torch.bfloat16)
    stats = {k.removeprefix("weight."): v for k, v in state.items() if k != "weight"}
    param = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    layer = bnb.nn.Linear4bit(128, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32, device="meta")
    layer.weight = param
    param.module = layer
    y = layer(torch.eye(128))
    assert torch.equal(y.detach().t().bfloat16(), nf4_dequantize(w))
    assert same(nf4_from_bitsandbytes(layer.state_dict()), w)


def test_a_stack_and_other_storage_convert(bnb):
    w = nf4_quantize(torch.randn(3, 4, 128))
    state = nf4_to_bitsandbytes(w, torch.float32)
    state["weight"] = state["weight"].flatten().view(torch.bfloat16)[:, None]  # quant_storage of sharded training
    assert same(nf4_from_bitsandbytes(state), w)


def test_conversion_errors(bnb):
    with pytest.raises(ValueError, match=r"nf4_to_bitsandbytes: w has shape \(1152, 4304\), wants K = 4304 to be a mult"):
        nf4_to_bitsandbytes(nf4_quantize(torch.randn(1152, 4304)), torch.float32)
    with pytest.raises(ValueError, match=r"nf4_from_bitsandbytes: weight has shape \(4, 96\), wants K = 96 to be a multiple"):
        nf4_from_bitsandbytes(saved(bnb, torch.randn(4, 96), False))
    state = nf4_to_bitsandbytes(nf4_quantize(torch.randn(4, 128)), torch.float32)
    with pytest.raises(
        ValueError, match=r"state has no 'weight.absmax', wants what bitsandbytes saves .*; it has \['weight', "
    ):
        nf4_from_bitsandbytes({k: v for k, v in state.items() if k != "weight.absmax"})
    with pytest.raises(ValueError, match=r"state has no 'w.quant_state.bitsandbytes__nf4'"):
        nf4_from_bitsandbytes(state, "w")
    with pytest.raises(ValueError, match="weight has quant_type 'nf4' or another table of values, wants 'nf4'"):
        nf4_from_bitsandbytes(state | {"weight.quant_map": state["weight.quant_map"].flip(0)})
    broken = state["weight.absmax"].clone()
    broken[5] = float("nan")
    with pytest.raises(ValueError, match="weight has NaN or infinity as the absmax of block 5, wants finite values"):
        nf4_from_bitsandbytes(state | {"weight.absmax": broken})


# --- contracts ---------------------------------------------------------------------------------------------------


def test_opcheck_and_compile():
    x = torch.randn(6, 100)
    torch.library.opcheck(torch.ops.swiftk.nf4_quantize.default, (x, 64, torch.float32, "auto"))
    w = nf4_quantize(x)
    torch.library.opcheck(torch.ops.swiftk.nf4_dequantize.default, (w.codes, w.absmax, 100, 64, torch.bfloat16, "auto"))
    compiled = torch.compile(lambda x: nf4_dequantize(nf4_quantize(x)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), nf4_dequantize(w))


def test_a_trained_weight_is_quantised_without_a_graph():
    w = nf4_quantize(torch.randn(4, 64, requires_grad=True))
    assert not w.absmax.requires_grad and not nf4_dequantize(w).requires_grad


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": torch.randn(4)}, r"nf4_quantize: weight has shape \(4,\), wants \(N, K\) or \(E, N, K\)"),
        ({"weight": torch.randn(2, 4).half()}, "nf4_quantize: weight has dtype torch.float16, wants torch.bfloat16"),
        ({"blocksize": 48}, "nf4_quantize: blocksize has 48, wants one of 32, 64"),
        ({"isa": "sse9"}, "nf4_quantize: isa has 'sse9', wants one of"),
        (
            {"absmax_dtype": torch.bfloat16},
            "absmax_dtype has torch.bfloat16, wants torch.float32 for a torch.float32 weight; bf16",
        ),
        (
            {"weight": torch.randn(2, 4).bfloat16(), "absmax_dtype": torch.bfloat16, "nested": True},
            "absmax_dtype has torch.bfloat16, wants torch.float32 for a torch.bfloat16 weight that is nested",
        ),
    ],
)
def test_errors_of_quantize(kwargs, message):
    with pytest.raises(ValueError, match=message):
        nf4_quantize(**({"weight": torch.randn(2, 64)} | kwargs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocksize": 65}, "nf4_dequantize: blocksize has 65, wants one of"),
        ({"in_features": 131}, r"codes has shape \(2, 64\), in_features 131 and blocksize 64 needs \(2, 66\)"),
        ({"blocksize": 128}, r"absmax has shape \(2, 2\), in_features 128 and blocksize 128 needs \(2, 1\)"),
        ({"absmax": torch.zeros(2, 2, dtype=torch.float64)}, "absmax has dtype torch.float64, wants torch.float32 or torch.bf"),
        ({"absmax": torch.zeros(2, 2, device="meta")}, "absmax has device meta, wants cpu like codes"),
        ({"codes": torch.zeros(128, dtype=torch.uint8)}, r"codes has shape \(128,\) of torch.uint8, wants \(..., N, K / 2\)"),
        ({"codes": torch.zeros(2, 64)}, r"codes has shape \(2, 64\) of torch.float32, wants"),
    ],
)
def test_errors_of_dequantize(change, message):
    with pytest.raises(ValueError, match=message):
        nf4_dequantize(nf4_quantize(torch.randn(2, 128))._replace(**change))


def test_more_errors_of_dequantize():
    w = nf4_quantize(torch.randn(2, 128), nested=True)
    with pytest.raises(ValueError, match=r"nf4_dequantize: dtype has torch.float64, wants torch.bfloat16 or torch.float32"):
        nf4_dequantize(w, torch.float64)
    with pytest.raises(ValueError, match="nf4_dequantize: w has type Tensor, wants an NF4Tensor; make one with"):
        nf4_dequantize(torch.randn(2, 128))
    with pytest.raises(ValueError, match=r"absmax has dtype torch.float32, wants torch.uint8"):
        nf4_dequantize(w._replace(absmax=w.absmax.float()))
    with pytest.raises(ValueError, match=r"nested.code_map has dtype torch.float64 on cpu, wants torch.float32 on cpu"):
        nf4_dequantize(w._replace(nested=Nested(*(t.double() for t in w.nested))))
    with pytest.raises(ValueError, match=r"nested.absmax has shape \(2,\), absmax \(2, 2\) needs \(1,\)"):
        nf4_dequantize(w._replace(nested=w.nested._replace(absmax=torch.zeros(2))))
