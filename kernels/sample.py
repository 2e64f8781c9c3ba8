"""The next token of each row of logits, and what is reported of it. Nothing here is differentiable.

    sample         token = argmax over the kept v of  x_v + g_v,   x_v = (z_v - max z) / T,   T = 0: argmax z
    noise          g_v = -log(-log(1 - q_v)),  q_v = (n_v + 1/2) 2^-52,  n_v the 52 bits that Philox4x32-10 (kernels/dropout.py)
                   draws for (seed, position, v): a token is drawn with probability exp(x_v) / sum exp x (Gumbel's maximum)
    kept           top-k: the first k in the order (logit descending, id ascending); top-p: of these, a token where the ones
                   before it hold less than p of their weight, w_v = round(2^44 exp x_v); min-p: where exp x_v >= min_p
    row_logprobs   log p_id = (z_id - m) - log l,  m = max z,  l = sum exp(z - m);  rank = 1 + tokens before it in the order
    adjust_logits_ z <- z / r if z > 0 else z r  where the id is in prompt or output; z <- z - frequency count - presence
                   where count > 0; z <- z + bias

All in fp64 but log p, which is `token_logprobs` of swiftk.kernels.linear_cross_entropy bit for bit: the same walk over the
vocabulary (csrc/cpu/vocab_stats.h). The weights of top-p are integers, so no order of summation enters. Equal values go to
the lowest id. A row's result depends on that row alone. The noise belongs to (seed, position, token), not to a generator's
state: a request draws the same text in any batch, and a draft that is sampled again is accepted exactly as often as it should.
Key (seed mod 2^32, seed / 2^32); counter (v / 4, position mod 2^32, position / 2^32, c), of whose words v takes number
v mod 4; c = 2^32 - 2 gives the upper 32 bits of n, c = 2^32 - 1 the lower 20 (the word / 2^12).
Sources: Gumbel-max, Maddison, Tarlow & Minka 2014; top-p, Holtzman et al. 2019; min-p, Nguyen et al. 2024; repetition penalty,
Keskar et al. 2019; the order of the filters is vLLM's.
Bytes: a greedy row is read once; else once, and again where a chunk of 128 tokens holds one that is likely enough.
Not supported: typical and epsilon sampling, beams.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from swiftk.kernels._checks import check_dtype, check_isa, check_shape, check_tensor
from swiftk.kernels._native import native, threads
from swiftk.kernels._sample_triton import adjust_logits_triton, sample_triton
from swiftk.kernels._triton import on_gpu
from swiftk.kernels.dropout import philox_ref
from swiftk.kernels.vocab_stats import RunningStats, update_stats

MAX_VOCAB = 1 << 19  # weights of 2^44 sum to less than 2^63
WEIGHT_BITS = 44


class RowLogprobs(NamedTuple):
    """(rows,) each, and (rows, n) of the n most likely tokens; log-probabilities in nats, in the logits' dtype."""

    logprob: torch.Tensor
    lse: torch.Tensor
    rank: torch.Tensor  # int64, 1 for the argmax
    top_ids: torch.Tensor  # int64, most likely first; -1 in a row that has NaN, +inf or no finite logit
    top_logprobs: torch.Tensor


# --- reference ---------------------------------------------------------------------------------------------------


def noise_ref(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """g (rows, vocab), fp64."""
    call, rows = torch.arange(-(-vocab // 4), device=seeds.device), []
    for seed, position in zip(seeds.tolist(), positions.tolist(), strict=True):
        high, low = (
            torch.stack(philox_ref([call, *(torch.full_like(call, c) for c in (position & 0xFFFFFFFF, position >> 32, last))],
                                   (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)), -1).flatten()[:vocab]
            for last in (2**32 - 2, 2**32 - 1)
        )  # fmt: skip
        n = high << 20 | low >> 12
        rows.append(-torch.log(-torch.log1p((n.double() + 0.5) * -(2.0**-52))))
    return torch.stack(rows) if rows else torch.empty(0, vocab, dtype=torch.float64, device=seeds.device)


def kept_ref(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """True where a token may be drawn, (rows, vocab); temperature above 0."""
    z = logits.double()
    x = (z - z.max(-1, keepdim=True).values) * (1 / temperature.double())[:, None]
    order = torch.sort(z, dim=-1, descending=True, stable=True).indices
    place = torch.arange(z.shape[-1], device=z.device)
    keep = place < torch.where(top_k > 0, top_k, len(place))[:, None]
    weight = (x.gather(-1, order).exp() * 2**WEIGHT_BITS).round().long() * keep
    before = weight.cumsum(-1) - weight
    target = top_p.double() * weight.sum(-1).double()
    keep &= (before.double() < target[:, None]) | (top_p >= 1)[:, None]
    return torch.zeros_like(keep).scatter(-1, order, keep) & (x >= min_p.double().log()[:, None])


def sample_ref(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor,
    seeds: torch.Tensor, positions: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The formula on whole rows."""
    z, greedy = logits.double(), temperature == 0
    t = temperature.where(~greedy, 1)
    x = (z - z.max(-1, keepdim=True).values) * (1 / t.double())[:, None]
    score = (x + noise_ref(seeds, positions, z.shape[-1])).where(kept_ref(logits, t, top_k, top_p, min_p), -torch.inf)
    score = torch.where(greedy[:, None], z, score)
    at_top = score == score.max(-1, keepdim=True).values
    return torch.arange(z.shape[-1], device=z.device).where(at_top, z.shape[-1]).min(-1).values


def row_logprobs_ref(logits: torch.Tensor, ids: torch.Tensor, top: int = 0) -> RowLogprobs:
    log_p, own = torch.log_softmax(logits, -1), logits.gather(-1, ids[:, None])
    first = (logits > own) | ((logits == own) & (torch.arange(logits.shape[-1], device=ids.device) < ids[:, None]))
    top_ids = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top]
    return RowLogprobs(
        log_p.gather(-1, ids[:, None])[:, 0], torch.logsumexp(logits, -1), first.sum(-1) + 1, top_ids, log_p.gather(-1, top_ids)
    )


def adjust_logits_ref(
    logits: torch.Tensor, offsets: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, in_prompt: torch.Tensor,
    bias: torch.Tensor, repetition: torch.Tensor, presence: torch.Tensor, frequency: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """A new tensor."""
    out = logits.clone()
    row = torch.repeat_interleave(torch.arange(len(logits), device=ids.device), offsets.diff())
    r, a, f, z = repetition[row].to(out), presence[row].to(out), frequency[row].to(out), logits[row, ids]
    z = torch.where(in_prompt | (counts > 0), torch.where(z > 0, z / r, z * r), z)
    out[row, ids] = z - (f * counts + a * (counts > 0)) + bias.to(out)
    return out


# --- launchers ---------------------------------------------------------------------------------------------------
# No checks; one native call for all rows. logits (rows, vocab) fp32 or fp64, contiguous rows any stride apart.


def sample_out(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor,
    seeds: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor, isa: str = "auto",
) -> None:  # fmt: skip
    """Writes ids (rows,) int64; -1 where a row has NaN, +inf or no finite logit. The others (rows,), contiguous."""
    if on_gpu(logits):
        sample_triton(logits, temperature, top_k, top_p, min_p, seeds, positions, ids)
        return
    rows, vocab = logits.shape
    native().sample(
        logits.dtype == torch.float64, logits.data_ptr(), logits.stride(0), rows, vocab, temperature.data_ptr(),
        top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr(), seeds.data_ptr(), positions.data_ptr(), ids.data_ptr(),
        row_threads(rows, vocab), isa,
    )  # fmt: skip


def row_logprobs_out(logits: torch.Tensor, ids: torch.Tensor, out: RowLogprobs, isa: str = "auto") -> None:
    """Writes out, whose tensors are contiguous; as many of the most likely tokens as top_ids has columns."""
    if on_gpu(logits):
        _row_logprobs_torch(logits, ids, out, isa)
        return
    rows, vocab = logits.shape
    native().row_logprobs(
        logits.dtype == torch.float64, logits.data_ptr(), logits.stride(0), rows, vocab, ids.data_ptr(), out.logprob.data_ptr(),
        out.lse.data_ptr(), out.rank.data_ptr(), out.top_ids.shape[1], out.top_ids.data_ptr(), out.top_logprobs.data_ptr(),
        row_threads(rows, vocab), isa,
    )  # fmt: skip


def _row_logprobs_torch(logits: torch.Tensor, ids: torch.Tensor, out: RowLogprobs, isa: str) -> None:
    """On CUDA: vocab_stats' kernel, so that logprob is token_logprobs', and torch for what is asked of single requests: rank
    and, by a stable sort, the most likely tokens."""
    running = RunningStats.start(logits, False, False)
    update_stats(logits, ids, 0, 0.0, running, isa)
    done = running.finish(ids, 0, logits.shape[1])
    out.logprob.copy_(done.logprob)
    out.lse.copy_(done.lse)
    own = logits.gather(1, ids[:, None])
    ahead = (logits > own) | ((logits == own) & (torch.arange(logits.shape[1], device=ids.device) < ids[:, None]))
    out.rank.copy_(ahead.sum(1) + 1)
    if (top := out.top_ids.shape[1]) > 0:
        z, order = (t[:, :top] for t in torch.sort(logits, dim=1, descending=True, stable=True))
        ordered = (logits.isfinite() | (logits == -torch.inf)).all(1, keepdim=True) & (running.m[:, None] > -torch.inf)
        out.top_ids.copy_(order.where(ordered, -1))
        out.top_logprobs.copy_((z - running.m[:, None] - done.log_l[:, None]).where(ordered, torch.nan))


def adjust_logits_out(
    logits: torch.Tensor, offsets: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, in_prompt: torch.Tensor,
    bias: torch.Tensor, repetition: torch.Tensor, presence: torch.Tensor, frequency: torch.Tensor,
) -> None:  # fmt: skip
    """As adjust_logits_, everything else contiguous."""
    arrays = (offsets, ids, counts, in_prompt, bias, repetition, presence, frequency)
    if on_gpu(logits):
        adjust_logits_triton(logits, *arrays)
        return
    native().adjust_logits(
        logits.dtype == torch.float64, logits.data_ptr(), logits.stride(0), len(logits), *(t.data_ptr() for t in arrays),
        min(max(1, len(logits)), threads(len(ids))),
    )  # fmt: skip


def row_threads(rows: int, vocab: int) -> int:
    return max(1, min(rows, threads(rows * vocab)))


def empty_logprobs(logits: torch.Tensor, top: int) -> RowLogprobs:
    rows = len(logits)

    def ids(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device=logits.device)

    return RowLogprobs(logits.new_empty(rows), logits.new_empty(rows), ids(rows), ids(rows, top), logits.new_empty(rows, top))


# --- public ------------------------------------------------------------------------------------------------------


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor,
    seeds: torch.Tensor, positions: torch.Tensor, *, isa: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """One token per row; a row's token depends on that row of every argument alone.

    Args:
        logits: (rows, vocab), fp32 or fp64, any strides; -inf bans a token. Not changed.
        temperature: (rows,) fp32, >= 0; 0: the argmax, nothing else of the row's parameters counts.
        top_k: (rows,) int32; 0: off. top_p: (rows,) fp32 in (0, 1]; 1: off. min_p: (rows,) fp32 in [0, 1]; 0: off. Applied
            in this order, after the temperature; the most likely token always stays.
        seeds: (rows,) int64. positions: (rows,) int64, number of the sampled token in its sequence, the prompt included.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable"; the results are equal.
    Returns: (rows,) int64.
    Raises: ValueError for a wrong shape, dtype, device or isa; for a value out of range, and for a row with NaN, +inf or no
        finite logit (its number); on CUDA, where nothing waits for values, such a row's token is -1, and ranges are the
        caller's. ImportError on CUDA without Triton.
    """
    _check_logits("sample", logits, isa)
    columns = {
        "temperature": (temperature, torch.float32), "top_k": (top_k, torch.int32), "top_p": (top_p, torch.float32),
        "min_p": (min_p, torch.float32), "seeds": (seeds, torch.int64), "positions": (positions, torch.int64),
    }  # fmt: skip
    for name, (t, dtype) in columns.items():
        _check_column("sample", name, t, dtype, len(logits), f"logits {tuple(logits.shape)}", logits.device)
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    arguments = (
        temperature.contiguous(), top_k.contiguous(), top_p.contiguous(), min_p.contiguous(), seeds.contiguous(),
        positions.contiguous(),
    )  # fmt: skip
    if logits.is_cuda:
        sample_out(_rows(logits), *arguments, ids, isa)
        return ids
    for name, good, want in (
        ("temperature", (temperature >= 0) & (temperature < torch.inf), "a finite number >= 0"),
        ("top_k", top_k >= 0, "at least 0 (0: off)"),
        ("top_p", (top_p > 0) & (top_p <= 1), "0 < top_p <= 1 (1: off)"),
        ("min_p", (min_p >= 0) & (min_p <= 1), "0 to 1 (0: off)"),
        ("positions", positions >= 0, "at least 0"),
    ):
        if not good.all():
            at = int((~good).nonzero()[0])
            raise ValueError(f"sample: {name} has {columns[name][0][at].item():.6g} in row {at}, wants {want}")
    sample_out(_rows(logits), *arguments, ids, isa)
    if (ids < 0).any():
        at = int((ids < 0).nonzero()[0])
        raise ValueError(f"sample: logits has NaN, +inf or no finite value in row {at}, wants one finite logit at least")
    return ids


def row_logprobs(logits: torch.Tensor, ids: torch.Tensor, top: int = 0, *, isa: str = "auto") -> RowLogprobs:
    """Log-probability and rank of one token per row, and the `top` most likely tokens, in one native call.

    On logits that linear_out or nf4_linear_out wrote in the accumulate dtype, logprob equals `token_logprobs` of the hidden
    states and the head bit for bit. The most likely tokens' come from the same formula: a token of rank 1 has the first's.

    Args:
        logits: (rows, vocab), fp32 or fp64, any strides. ids: (rows,) int64 in [0, vocab). top: 0 to vocab.
        isa: instruction set of the CPU kernel: "auto", "avx512", "avx2" or "portable".
    Returns: logprob, lse, rank (rows,), top_ids, top_logprobs (rows, top), see RowLogprobs.
    Raises: ValueError for a wrong shape, dtype, device, range (on CUDA not of ids) or isa; on CUDA ImportError without Triton.
    """
    _check_logits("row_logprobs", logits, isa)
    _check_column("row_logprobs", "ids", ids, torch.int64, len(logits), f"logits {tuple(logits.shape)}", logits.device)
    _check_ids("row_logprobs", ids, logits.shape[1])
    if not 0 <= top <= logits.shape[1]:
        raise ValueError(f"row_logprobs: top has {top}, wants 0 to vocab = {logits.shape[1]}")
    out = empty_logprobs(logits, top)
    row_logprobs_out(_rows(logits), ids.contiguous(), out, isa)
    return out


def adjust_logits_(
    logits: torch.Tensor, offsets: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, in_prompt: torch.Tensor,
    bias: torch.Tensor, repetition: torch.Tensor, presence: torch.Tensor, frequency: torch.Tensor,
) -> None:  # fmt: skip
    """Penalties and biases in place, on the tokens that have any.

    Args:
        logits: (rows, vocab), fp32 or fp64, contiguous rows. offsets: (rows + 1,) int64: row i has the entries offsets[i] ...
            offsets[i + 1] - 1 of the next four, (n,) each.
        ids: int64 in [0, vocab), each once in a row. counts: int32, occurrences in the output. in_prompt: bool.
        bias: fp32, added last; -inf bans the token.
        repetition: (rows,) fp32 > 0, 1: off. presence, frequency: (rows,) fp32, 0: off.
    Raises: ValueError for a wrong shape, dtype, device or range; on CUDA ImportError without Triton. There no value is looked
        at: an id out of range is asserted under TRITON_DEBUG=1 and passed over else; offsets that do not rise from 0 to n and
        an id twice in a row are the caller's to exclude.
    """
    _check_logits("adjust_logits_", logits, "auto")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"adjust_logits_: logits has strides {logits.stride()}, wants contiguous rows; they change in place")
    rows, why = len(logits), f"logits {tuple(logits.shape)}"
    for name, t in (("repetition", repetition), ("presence", presence), ("frequency", frequency)):
        _check_column("adjust_logits_", name, t, torch.float32, rows, why, logits.device)
    _check_column("adjust_logits_", "offsets", offsets, torch.int64, rows + 1, why, logits.device)
    check_tensor("adjust_logits_", "ids", ids)
    if ids.dim() != 1:
        raise ValueError(f"adjust_logits_: ids has shape {tuple(ids.shape)}, wants (n,)")
    if not logits.is_cuda and (offsets[0] != 0 or offsets[-1] != len(ids) or (offsets.diff() < 0).any()):
        have = f"{offsets.tolist()}" if rows < 8 else f"{offsets[0]} ... {offsets[-1]}"
        raise ValueError(f"adjust_logits_: offsets has {have}, wants to rise from 0 to {len(ids)}, the number of ids")
    for name, t, dtype in (
        ("ids", ids, torch.int64), ("counts", counts, torch.int32), ("in_prompt", in_prompt, torch.bool),
        ("bias", bias, torch.float32),
    ):  # fmt: skip
        _check_column("adjust_logits_", name, t, dtype, len(ids), f"ids {tuple(ids.shape)}", logits.device)
    arrays = (t.contiguous() for t in (offsets, ids, counts, in_prompt, bias, repetition, presence, frequency))
    if logits.is_cuda:
        adjust_logits_out(logits, *arrays)
        return
    _check_ids("adjust_logits_", ids, logits.shape[1])
    keys = torch.repeat_interleave(torch.arange(rows), offsets.diff()) * logits.shape[1] + ids
    if len(keys.unique()) < len(keys):
        raise ValueError("adjust_logits_: ids has an id twice in a row, wants each once, with its count")
    if not (repetition > 0).all():
        raise ValueError(f"adjust_logits_: repetition has {repetition.min().item():.6g}, wants more than 0 (1: off)")
    adjust_logits_out(logits, *arrays)


def _rows(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _check_logits(op: str, logits: torch.Tensor, isa: str) -> None:
    if not isinstance(logits, torch.Tensor) or logits.dtype not in (torch.float32, torch.float64):
        got = f"dtype {logits.dtype}" if isinstance(logits, torch.Tensor) else f"type {type(logits).__name__}"
        raise ValueError(f"{op}: logits has {got}, wants torch.float32 or torch.float64")
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_VOCAB:
        raise ValueError(f"{op}: logits has shape {tuple(logits.shape)}, wants (rows, vocab) with 1 <= vocab <= {MAX_VOCAB}")
    check_isa(op, isa)


def _check_column(
    op: str, name: str, t: torch.Tensor, dtype: torch.dtype, size: int, why: str, device: torch.device
) -> None:  # fmt: skip
    check_dtype(op, name, t, dtype, device, "logits")
    check_shape(op, name, t, (size,), why)


def _check_ids(op: str, ids: torch.Tensor, vocab: int) -> None:
    bad = (ids < 0) | (ids >= vocab)
    if not ids.is_cuda and bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"{op}: ids has {int(ids[at])} at position {at}, wants 0 <= id < vocab = {vocab}")
