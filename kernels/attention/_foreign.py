"""Other people's packed attention behind `varlen_attention(..., backend=)`: asked for, never chosen, and no promise of ours
holds for it (repeatable gradients, rows that do not depend on each other, tokens past cu_seqlens[-1]). No GPU has run these
calls yet: they are checked against stand-ins with the packages' signatures.

"flash_attn": flash_attn_varlen_func of flash_attn.cute (FA4), flash_attn_interface (FA3) or flash_attn (FA2), the first that is
installed; an argument that the installed function does not have is refused by name. "cudnn": torch's
scaled_dot_product_attention with cuDNN alone allowed, one call per document. Both want bf16, and where they want lengths on the
host (cuDNN, FA2, FA3) the call waits for the GPU: no CUDA graph.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

FLASH_MODULES = ("flash_attn.cute", "flash_attn_interface", "flash_attn")
CUDNN = [SDPBackend.CUDNN_ATTENTION]
BACKENDS = ("swiftk", "flash_attn", "cudnn")
OP = "varlen_attention"


def _refuse(backend: str, **given: Any) -> None:
    """The arguments that the backend does not have, where they are given: {"softcap": (value, what it wants)}."""
    for name, (value, wants) in given.items():
        if value != wants:
            raise ValueError(f"{OP}: {name} has {value}, backend {backend!r} as installed wants {wants}; leave out backend")


def _longest(cu: torch.Tensor) -> int:
    return int((cu[1:] - cu[:-1]).max()) if cu.numel() > 1 else 0


def _flash_function() -> Any:
    for name in FLASH_MODULES:
        try:
            return importlib.import_module(name).flash_attn_varlen_func
        except (ImportError, AttributeError) as error:
            missing = error
    raise ImportError(
        f"{OP}: backend has 'flash_attn', which cannot be imported ({missing}); pip install flash-attn, or leave out backend"
    )


def flash_attention(q, k, v, cu_q, cu_k, causal: bool, scale: float, window_size, softcap: float, sinks) -> torch.Tensor:
    f = _flash_function()
    known = inspect.signature(f).parameters
    needed = {"cu_seqlens_q", "cu_seqlens_k", "softmax_scale", "causal", "window_size"}
    if not needed <= known.keys():
        raise ImportError(
            f"{OP}: the installed flash_attn_varlen_func takes {', '.join(known)}, wants {', '.join(sorted(needed))} "
            "among them; leave out backend"
        )
    none = known["window_size"].default[0] if isinstance(known["window_size"].default, tuple) else -1
    given: dict[str, Any] = dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, softmax_scale=scale, causal=causal)
    given["window_size"] = tuple(none if size < 0 else int(size) for size in window_size)
    if "softcap" in known:
        given["softcap"] = softcap
    else:
        _refuse("flash_attn", softcap=(softcap, 0.0))
    if "learnable_sink" in known:
        given["learnable_sink"] = sinks
    elif sinks is not None:
        raise ValueError(f"{OP}: sinks has a tensor, backend 'flash_attn' as installed wants None; leave out backend")
    for name, cu in (("max_seqlen_q", cu_q), ("max_seqlen_k", cu_k)):
        if name in known and known[name].default is inspect.Parameter.empty:  # FA4 does without
            given[name] = _longest(cu)
    out = f(q, k, v, **given)
    return out[0] if isinstance(out, tuple) else out


def cudnn_attention(q, k, v, cu_q, cu_k, causal: bool, scale: float, window_size, softcap: float, sinks) -> torch.Tensor:
    _refuse("cudnn", softcap=(softcap, 0.0), window_size=(tuple(window_size), (-1, -1)))
    if sinks is not None:
        raise ValueError(f"{OP}: sinks has a tensor, backend 'cudnn' wants None; leave out backend")
    of_q, of_k = cu_q.tolist(), cu_k.tolist()
    outs = []
    for q0, q1, k0, k1 in zip(of_q, of_q[1:], of_k, of_k[1:], strict=False):
        if causal and q1 - q0 != k1 - k0:
            raise ValueError(
                f"{OP}: cu_seqlens_k has another document's length than cu_seqlens_q, backend 'cudnn' wants them equal where "
                "causal: it aligns to the top left"
            )
        a, b, c = (x[first:last].transpose(0, 1)[None] for x, first, last in ((q, q0, q1), (k, k0, k1), (v, k0, k1)))
        if q1 > q0:
            with sdpa_kernel(CUDNN):
                out = scaled_dot_product_attention(a, b, c, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            outs.append(out[0].transpose(0, 1))
    outs.append(q.new_zeros(q.shape[0] - of_q[-1], *q.shape[1:]))
    return torch.cat(outs)


def foreign_attention(backend: str, q, k, v, cu_q, cu_k, *options: Any) -> torch.Tensor:
    if not q.is_cuda:
        raise ValueError(f"{OP}: q has device {q.device}, backend {backend!r} wants a CUDA device")
    if q.dtype != torch.bfloat16:
        raise ValueError(f"{OP}: q has dtype {q.dtype}, backend {backend!r} wants torch.bfloat16")
    return (flash_attention if backend == "flash_attn" else cudnn_attention)(q, k, v, cu_q, cu_k, *options)
