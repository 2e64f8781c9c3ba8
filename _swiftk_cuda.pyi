"""The CUDA kernels: addresses, sizes, a stream. kernels/*.py checks them; nothing waits for the device."""

from collections.abc import Sequence

__version__: str
__sources__: str
_Scales = tuple[int, int, int, int, int, int]  # kind, address, row stride; nested: code_map, absmax, offset
# codes, absmax, blocksize, s, t, rank, scale, bias, y, N
_Nf4OnGpu = tuple[
    tuple[int, int], tuple[int, int, int, int, int, int], int, tuple[int, int], tuple[int, int], int, int, int, tuple[int, int],
    int,
]  # fmt: skip

def nf4_dequantize(
    codes: int, ld_codes: int, scales: _Scales, rows: int, cols: int, blocksize: int, wide: bool, out: int, ld_out: int,
    stream: int,
) -> None: ...  # fmt: skip
def nf4_quantize(
    dtype: int, x: int, ldx: int, rows: int, cols: int, blocksize: int, codes: int, narrow: bool, absmax: int, first_bad: int,
    stream: int,
) -> None: ...  # fmt: skip
def nf4_linear(x: tuple[int, int], M: int, K: int, wide: bool, products: Sequence[_Nf4OnGpu], stream: int) -> None: ...
def nf4_linear_dx(
    dy: tuple[int, int], M: int, N: int, K: int, codes: tuple[int, int], scales: tuple[int, int, int, int, int, int],
    blocksize: int, splits: int, out: int, stream: int,
) -> None: ...  # fmt: skip
