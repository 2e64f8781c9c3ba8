"""The compiled kernels: addresses, sizes, a dtype code, a thread count, an instruction set. kernels/*.py checks them."""

from collections.abc import Sequence

__version__: str
__sources__: str
_Product = tuple[tuple[int, int], tuple[int, int], int, int, int, tuple[int, int], int]  # s, t, J, scale, bias, y, N
# codes, absmax, blocksize, s, t, rank, scale, bias, y, N
_Nf4OnGpu = tuple[
    tuple[int, int], tuple[int, int, int, int, int, int], int, tuple[int, int], tuple[int, int], int, int, int, tuple[int, int],
    int,
]  # fmt: skip

class Tape:
    """Records the calls of this thread between start and stop that csrc binds with `define`; run makes them again."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def run(self) -> None: ...
    def __len__(self) -> int: ...

def best_isa() -> str: ...
def resolve_isa(name: str) -> None: ...
def read_memory(data: int, bytes: int, threads: int) -> int: ...
def adamw_8bit(
    tensors: int, rates: int, count: int, signed_code: tuple[int, ...], unsigned_code: tuple[int, ...], threads: int, isa: str,
) -> None: ...  # fmt: skip
def linear_fwd(
    dtype: int, acc_out: bool, x: tuple[int, int], weights: Sequence[tuple[int, int]], products: Sequence[_Product], M: int,
    K: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
def nf4_dequantize_as_on_gpu(
    codes: int, ld_codes: int, scales: tuple[int, int, int, int, int, int], rows: int, cols: int, blocksize: int, wide: bool,
    out: int, ld_out: int,
) -> None: ...  # fmt: skip
def nf4_quantize_as_on_gpu(
    dtype: int, x: int, ldx: int, rows: int, cols: int, blocksize: int, codes: int, narrow: bool, absmax: int,
) -> int: ...  # fmt: skip
def nf4_decode_as_on_gpu(codes: int, words: int, absmax: float, out: int) -> None: ...
def nf4_linear_fwd(
    dtype: int, acc_out: bool, x: tuple[int, int], weights: Sequence[tuple[tuple[int, int], tuple[int, int], bool, int]],
    products: Sequence[_Product], M: int, K: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
def nf4_linear_as_on_gpu(x: tuple[int, int], M: int, K: int, wide: bool, products: Sequence[_Nf4OnGpu]) -> None: ...
def nf4_linear_dx_as_on_gpu(
    dy: tuple[int, int], M: int, N: int, K: int, codes: tuple[int, int], scales: tuple[int, int, int, int, int, int],
    blocksize: int, splits: int, out: int,
) -> None: ...  # fmt: skip
def dropout_fwd(
    dtype: int, x: int, ldx: int, y: int, ldy: int, rows: int, cols: int, scale: float, threshold: int, seed_step: int,
    layer: int, token_index: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
def keep_own(dtype: int, s: int, lds: int, rows: int, adapters: int, columns: int, ids: int) -> None: ...
def rank_gram(
    dtype: int, p: int, ldp: int, rank: int, q: int, ldq: int, rows: int, cols: int, out: int, threshold: int, seed_step: int,
    layer: int, token_index: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
def rank_update(
    dtype: int, p: int, ldp: int, rank: int, r: int, q: int, ldq: int, rows: int, cols: int, threshold: int, seed_step: int,
    layer: int, token_index: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
def column_dot(
    dtype: int, p: int, ldp: int, q: int, ldq: int, rows: int, cols: int, out: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
def merge_fwd(
    dtype: int, out_a: int, lse_a: int, out_b: int, lse_b: int, out: int, lse: int, tokens: int, heads: int, dim: int,
    threads: int, isa: str,
) -> None: ...  # fmt: skip
def merge_bwd(
    dtype: int, dout: int, dlse: int, out_a: int, lse_a: int, out_b: int, lse_b: int, dout_a: int, dlse_a: int,
    dout_b: int, dlse_b: int, tokens: int, heads: int, dim: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
def nf4_quantize(
    dtype: int, x: int, ldx: int, rows: int, cols: int, blocksize: int, codes: int, absmax_dtype: int, absmax: int,
    threads: int, isa: str,
) -> int: ...  # fmt: skip
def nf4_dequantize(
    codes: int, ld_codes: int, absmax_dtype: int, absmax: int, ld_absmax: int, rows: int, cols: int, blocksize: int,
    dtype: int, out: int, ld_out: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
def paged_fwd(
    dtype: int, q: tuple[int, int, int], total_q: int,
    cache: tuple[tuple[int, int, int, int], tuple[int, int, int, int], int, int],
    options: tuple[int, int, int, float, float, int, int], cu_seqlens_q: int, cache_seqlens: int,
    block_table: tuple[int, int, int], batch: int, out: int, ld_out: int, lse: int, sinks: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
def store_kv(
    dtype: int, k: tuple[int, int, int], v: tuple[int, int, int],
    cache: tuple[tuple[int, int, int, int], tuple[int, int, int, int], int, int], slot_mapping: int, tokens: int, heads: int,
    dim: int, threads: int,
) -> None: ...  # fmt: skip
def rms_norm_fwd(
    dtype: int, x: int, residual: int, w: int, y: int, rstd: int, rows: int, cols: int, eps: float, threads: int, isa: str,
) -> None: ...  # fmt: skip
def rms_norm_bwd(
    dtype: int, dy: int, x: int, w: int, rstd: int, dx: int, dw: int, dw_blocks: int, rows: int, cols: int, threads: int,
    isa: str,
) -> None: ...  # fmt: skip
def rope(
    dtype: int, x: int, token_stride: int, head_stride: int, cos: int, sin: int, table_rows: int, positions: int,
    wide_positions: bool, y: int, tokens: int, heads: int, head_dim: int, half: int, inverse: bool, threads: int,
    isa: str,
) -> None: ...  # fmt: skip
def rope_table(dtype: int, inv_freq: int, rows: int, half: int, scale: float, cos: int, sin: int, threads: int) -> None: ...
def swiglu_fwd(
    dtype: int, gate: int, gate_stride: int, up: int, up_stride: int, y: int, rows: int, cols: int, threads: int,
    isa: str,
) -> None: ...  # fmt: skip
def swiglu_bwd(
    dtype: int, dy: int, dy_stride: int, gate: int, gate_stride: int, up: int, up_stride: int, dgate: int, dup: int,
    rows: int, cols: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
def varlen_fwd(
    dtype: int, q: tuple[int, int, int], k: tuple[int, int, int], v: tuple[int, int, int], total_q: int, total_k: int,
    options: tuple[int, int, int, float, float, int, int], t: tuple[int, int, int], out: int, wide: bool, resume: bool,
    lse: int, sinks: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
def varlen_bwd(
    dtype: int, dout: tuple[int, int, int], q: tuple[int, int, int], k: tuple[int, int, int], v: tuple[int, int, int],
    total_q: int, total_k: int, options: tuple[int, int, int, float, float, int, int], t: tuple[int, int, int], out: int,
    wide: bool, lse: int, dlse: int, sinks: int, scratch: int, dq: int, dk: int, dv: int, dsinks: int, threads: int,
    isa: str,
) -> None: ...  # fmt: skip
def sample(
    wide: bool, logits: int, stride: int, rows: int, cols: int, temperature: int, top_k: int, top_p: int, min_p: int,
    seeds: int, positions: int, ids: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
def row_logprobs(
    wide: bool, logits: int, stride: int, rows: int, cols: int, ids: int, logprob: int, lse: int, rank: int, top: int,
    top_ids: int, top_logprob: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
def adjust_logits(
    wide: bool, logits: int, stride: int, rows: int, offsets: int, ids: int, counts: int, in_prompt: int, bias: int,
    repetition: int, presence: int, frequency: int, threads: int,
) -> None: ...  # fmt: skip
def vocab_stats(
    acc: int, logits: int, stride: int, labels: int, rows: int, cols: int, first_id: int, softcap: float, mx: int, l: int,
    e: int, sum: int, label: int, argmax: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
def vocab_finish(
    acc: int, mx: int, l: int, e: int, sum: int, label: int, argmax: int, labels: int, first_id: int, vocab: int,
    log_l: int, lse: int, logprob: int, entropy: int, rows: int,
) -> None: ...  # fmt: skip
def vocab_stats_exp(
    acc: int, gradient: int, logits: int, stride: int, labels: int, rows: int, cols: int, first_id: int, softcap: float,
    mx: int, l: int, e: int, sum: int, label: int, argmax: int, g: int, g_stride: int, out: int, width: int, threads: int,
    isa: str,
) -> None: ...  # fmt: skip
def vocab_grad(
    acc: int, gradient: int, logits: int, stride: int, labels: int, rows: int, cols: int, first_id: int, softcap: float,
    capped: bool, mx: int, log_l: int, entropy: int, dlse: int, dlabel: int, dsum: int, dentropy: int, g: int,
    g_stride: int, threads: int, isa: str,
) -> None: ...  # fmt: skip
