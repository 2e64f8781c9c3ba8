"""rope: table against transformers, values, gradients, token invariance, operator contracts, errors."""

from __future__ import annotations

import math

import pytest
import torch

from swiftk.kernels.rope import rope, rope_frequencies, rope_out, rope_ref, rope_table
from swiftk.testing.accuracy import assert_accurate

# total, heads, head_dim, rotary_dim
SHAPES = [(1, 1, 2, 2), (7, 3, 10, 6), (5, 2, 64, 64), (33, 4, 40, 40), (4, 5, 96, 24), (3, 1, 134, 66)]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS = [
    (None, 10000.0),
    ({"rope_type": "default"}, 1e6),
    ({"rope_type": "linear", "factor": 2.5}, 10000.0),
    (LLAMA3, 500000.0),
    ({**LLAMA3, "factor": 32.0, "low_freq_factor": 2, "original_max_position_embeddings": 1024}, 10000.0),
    (YARN, 1e6),
    ({**YARN, "beta_fast": 16, "beta_slow": 2.0, "truncate": False}, 10000.0),
    ({**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "original_max_position_embeddings": 4096}, 10000.0),
    ({**YARN, "attention_factor": 1.5, "mscale": None, "beta_fast": None}, 10000.0),
    ({**YARN, "factor": 1.0, "original_max_position_embeddings": 32}, 150.0),  # beta_fast and beta_slow give one pair: a step
]


def table_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def make(shape, dtype, max_position=50):
    total, heads, head_dim, rotary_dim = shape
    x = torch.randn(total, heads, head_dim, dtype=torch.float64).to(dtype)
    cos, sin = rope_table(rotary_dim, max_position, dtype=table_dtype(dtype))
    return x, cos, sin, torch.randint(0, max_position, (total,))


# --- table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotary_dim", [6, 64, 128])
@pytest.mark.parametrize(("scaling", "theta"), SCALINGS)
def test_frequencies_equal_transformers(scaling, theta, rotary_dim):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=rotary_dim * 2, num_attention_heads=2, max_position_embeddings=131072)
    config.rope_parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    kind = config.rope_parameters["rope_type"]
    oracle = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    want, want_scale = oracle(config)
    inv_freq, scale = rope_frequencies(rotary_dim, theta=theta, scaling=scaling)
    assert inv_freq.dtype == torch.float32 and torch.equal(inv_freq, want)
    assert scale == pytest.approx(want_scale, rel=1e-15)
    # the caller may hand over the whole of rope_parameters
    assert torch.equal(rope_frequencies(rotary_dim, theta=theta, scaling=config.rope_parameters)[0], want)


@pytest.mark.parametrize(("scaling", "theta"), SCALINGS)
def test_scaling_changes_what_it_says(scaling, theta):
    """Independent of any implementation: fast pairs are kept, slow ones divided by factor, each between the two."""
    plain, _ = rope_frequencies(128, theta=theta)
    scaled, _ = rope_frequencies(128, theta=theta, scaling=scaling)
    factor = (scaling or {}).get("factor", 1.0)
    ratio = plain.double() / scaled.double()
    assert ((ratio >= 1 - 1e-6) & (ratio <= factor * (1 + 1e-6))).all()
    if scaling and scaling["rope_type"] in ("llama3", "yarn") and factor > 1:
        assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_table_values(dtype):
    cos, sin = rope_table(32, 3000, theta=500000.0, scaling={**YARN, "attention_factor": 1.25}, dtype=dtype)
    inv_freq, _ = rope_frequencies(32, theta=500000.0, scaling=YARN)
    for p in (0, 1, 17, 2999):
        for j in (0, 5, 15):
            angle = p * inv_freq[j].item()
            assert cos[p, j].item() == pytest.approx(1.25 * math.cos(angle), abs=2 * torch.finfo(dtype).eps)
            assert sin[p, j].item() == pytest.approx(1.25 * math.sin(angle), abs=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_table_row_depends_on_its_position_alone(dtype, thread_count):
    long = thread_count(2, lambda: rope_table(6, 131072, scaling=LLAMA3, theta=500000.0, dtype=dtype))
    for rows in (0, 1, 127, 1000, 65537):
        short = thread_count(1, lambda rows=rows: rope_table(6, rows, scaling=LLAMA3, theta=500000.0, dtype=dtype))
        assert all(torch.equal(a, b[:rows]) for a, b in zip(short, long, strict=True))


def test_table_against_transformers():
    """At short positions, where transformers' fp32 angles are still good, through its own apply_rotary_pos_emb."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=64)
    config.rope_parameters = {**YARN, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
    x = torch.randn(1, 40, 2, 32)
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(40)[None])
    want, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    ours = rope(x[0], *rope_table(32, 64, scaling=config.rope_parameters), torch.arange(40))
    torch.testing.assert_close(ours, want[0], rtol=0, atol=1e-5)


# --- op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, isa):
    x, cos, sin, positions = make(shape, dtype)
    dy = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    results = []
    for f, cast in ((lambda *a: rope(*a, isa=isa), False), (rope_ref, False), (rope_ref, True)):
        xs = (x.double() if cast else x).detach().requires_grad_()
        y = f(xs, cos.double() if cast else cos, sin.double() if cast else sin, positions)
        results.append((y, *torch.autograd.grad(y, xs, dy.to(xs.dtype))))
    for name, ours, plain, exact in zip(("y", "dx"), *results, strict=True):
        assert_accurate(ours, plain, exact, name)
    assert torch.equal(results[0][0], results[1][0])  # no fused products: every instruction set has the formula's bits


def test_against_complex_rotation():
    """Another way to write it: the pair (x1, x2) as a complex number times exp(i angle)."""
    x, cos, sin, positions = make((9, 2, 8, 8), torch.float64)
    inv_freq, _ = rope_frequencies(8)
    turn = torch.exp(1j * positions[:, None].double() * inv_freq.double())
    want = torch.complex(x[..., :4], x[..., 4:]) * turn[:, None]
    y = rope(x, cos, sin, positions)
    assert (torch.complex(y[..., :4], y[..., 4:]) - want).abs().max() <= 1e-14


def test_backward_undoes_the_rotation_and_differentiates_again():
    x, cos, sin, positions = make((5, 2, 12, 8), torch.float64)
    x.requires_grad_()
    y = rope(x, cos, sin, positions)
    (dx,) = torch.autograd.grad(y, x, y.detach(), retain_graph=True)
    assert (dx - x).abs().max() <= 1e-14
    (again,) = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(dx, again)

    def penalty(f):  # a gradient of a gradient that is not zero
        (dx,) = torch.autograd.grad(f(x, cos, sin, positions).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(penalty(rope), penalty(rope_ref), rtol=1e-13, atol=1e-12)


def test_empty_and_non_contiguous(isa):
    x, cos, sin, positions = make((6, 4, 16, 12), torch.float32)
    assert rope(x[:0], cos, sin, positions[:0]).shape == (0, 4, 16)
    assert rope(x[:, :0], cos, sin, positions).shape == (6, 0, 16)
    fused = torch.randn(6, 10 * 16)
    wide = torch.randn(6, 4, 32)
    views = [
        fused[:, 64:128].view(6, 4, 16),  # k of a fused projection
        fused.view(6, 10, 16)[:, ::3],
        fused.view(6, 10, 16)[:, :4].transpose(0, 1).contiguous().transpose(0, 1),
        wide[..., ::2],
        torch.randn(1, 1, 16).expand(6, 4, 16),
        torch.randn(6, 4, 1).expand(6, 4, 16),
    ]
    table = torch.cat((cos, sin), -1)  # its halves are rows with a stride
    for v in views:
        got = rope(v, table[:, :6], table[:, 6:], positions.repeat_interleave(2)[::2], isa=isa)
        assert torch.equal(got, rope_ref(v, cos, sin, positions)) and got.is_contiguous()


def test_int32_positions_are_the_same(isa):
    x, cos, sin, positions = make((20, 2, 16, 16), torch.bfloat16)
    assert torch.equal(rope(x, cos, sin, positions.int(), isa=isa), rope(x, cos, sin, positions, isa=isa))


def test_writes_every_output_and_nothing_else(isa):
    x, cos, sin, positions = make((5, 3, 19, 14), torch.float32)
    y = torch.full((7, 3, 19), float("nan"))
    rope_out(x, cos, sin, positions, y[1:6], isa=isa)
    assert torch.equal(y[1:6], rope_ref(x, cos, sin, positions)) and y[0].isnan().all() and y[6].isnan().all()
    rope_out(x, cos, sin, positions, x, isa=isa)  # in place
    assert torch.equal(x, y[1:6])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_depends_on_that_token_alone(dtype, isa, thread_count):
    """35,880 elements: two threads."""
    x, cos, sin, positions = make((260, 3, 46, 38), dtype)
    x[3] = float("nan")
    whole = thread_count(2, lambda: rope(x, cos, sin, positions, isa=isa))
    clean = torch.arange(260) != 3
    alone = thread_count(
        1, lambda: torch.cat([rope(row[None], cos, sin, p[None], isa=isa) for row, p in zip(x, positions, strict=True)])
    )
    assert torch.equal(whole[clean], alone[clean]) and whole[3].isnan().all()


def test_opcheck_and_compile():
    x, cos, sin, positions = make((4, 2, 16, 12), torch.float32)
    x.requires_grad_()
    torch.library.opcheck(torch.ops.swiftk.rope.default, (x, cos, sin, positions, False, "auto"))
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    (ours,), (theirs,) = (
        torch.autograd.grad(f(x, cos, sin, positions).square().sum(), x, create_graph=False) for f in (rope, compiled)
    )
    assert torch.equal(compiled(x, cos, sin, positions), rope(x, cos, sin, positions)) and torch.equal(ours, theirs)


X, COS, SIN, POS = torch.randn(3, 2, 8), torch.randn(5, 4), torch.randn(5, 4), torch.arange(3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X, COS, SIN, torch.tensor([0, 7, 9])), r"rope: positions has 7 at token 1, wants 0 \.\. 4 \(cos has 5 rows\)"),
        ((X, COS, SIN, torch.tensor([0, 1, -1], dtype=torch.int32)), r"rope: positions has -1 at token 2, wants 0 \.\. 4"),
        ((X[0], COS, SIN, POS), r"rope: x has shape \(2, 8\), wants \(total, heads, head_dim\)"),
        ((X.half(), COS, SIN, POS), "rope: x has dtype torch.float16"),
        ((X.double(), COS, SIN, POS), "rope: cos has dtype torch.float32, wants torch.float64 for x in torch.float64"),
        ((X, COS, SIN.double(), POS), "rope: sin has dtype torch.float64, wants torch.float32 like cos"),
        ((X, COS, SIN[:4], POS), r"rope: sin has shape \(4, 4\), cos \(5, 4\) needs \(5, 4\)"),
        ((X[..., :6], COS, SIN, POS), r"rope: cos has shape \(5, 4\), wants .* rotary_dim <= head_dim 6"),
        ((X, COS[:, :0], SIN[:, :0], POS), r"rope: cos has shape \(5, 0\), wants"),
        ((X, COS, SIN, POS[:2]), r"rope: positions has shape \(2,\), x \(3, 2, 8\) needs \(3,\)"),
        ((X, COS, SIN, POS.float()), "rope: positions has dtype torch.float32, wants torch.int64 or torch.int32"),
        ((X, COS.clone().requires_grad_(), SIN, POS), "rope: cos or sin has requires_grad, wants a constant table"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        rope(*args)
    with pytest.raises(ValueError, match="rope: isa has 'sse9', wants one of"):
        rope(X, COS, SIN, POS, isa="sse9")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rotary_dim": 7}, "rope_table: rotary_dim has 7, wants an even number"),
        ({"max_position": -1}, "rope_table: max_position has -1, wants 0 or more"),
        ({"theta": 1.0}, "rope_table: theta has 1.0, wants more than 1"),
        ({"dtype": torch.bfloat16}, "rope_table: dtype has torch.bfloat16, wants torch.float32 or torch.float64"),
        (
            {"scaling": {"rope_type": "longrope", "factor": 2.0}},
            "scaling has rope_type 'longrope', wants one of default, linear",
        ),
        ({"scaling": {"type": "linear", "factor": 2.0}}, "rope_table: scaling has key 'type', rope_type 'default' wants"),
        ({"scaling": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position_embeddings None, rope_type 'yarn' wants"),
        ({"scaling": {**LLAMA3, "factor": 0}}, "scaling has factor 0, rope_type 'llama3' wants a number above 0"),
        ({"scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "high_freq_factor 4.0, wants more than low_freq_factor 4.0"),
        ({"scaling": {**YARN, "beta_fats": 32}}, "rope_table: scaling has key 'beta_fats', rope_type 'yarn' wants .*beta_fast"),
        ({"scaling": {"rope_type": "default", "rope_theta": 5e5}}, "scaling has rope_theta 500000.0, wants theta 10000.0"),
    ],
)
def test_table_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        rope_table(**{"rotary_dim": 8, "max_position": 4, **kwargs})
