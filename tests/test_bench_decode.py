"""The decoder's benchmark: every work runs and reports, peers have our weights, what is computed from sizes is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from swiftk.benchmarks import bench_decode, decode_measure, decode_peers, decode_variants, report
from swiftk.benchmarks.decode_measure import QUICK, TINY, Bench
from swiftk.benchmarks.harness import Limits, Options
from swiftk.model.adapter import resolve
from swiftk.model.parameters import param_specs
from swiftk.parallel.mesh import Mesh

ORIGIN = {"commit": "abc", "environment": {"threads": 2}}  # what --save adds


@pytest.fixture(autouse=True)
def one_thread_and_no_measured_limits(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(Limits, "bandwidth", lambda self: 1e9)
    monkeypatch.setattr(Limits, "matmul", lambda self, dtype: 1e9)
    yield
    torch.set_num_threads(threads)


def bench(folder: Path, **options) -> Bench:
    return Bench(Options(quick=True, **options), QUICK, torch.float32, folder, Limits("cpu"))


def test_a_quick_run_reports_every_work(capsys):
    kept = {}
    options = Options(quick=True, dtypes=("float32",), peers=frozenset())
    records = bench_decode.run(options, [], kept.__setitem__)
    assert list(kept) == [f"decode-{work}" for work in bench_decode.WORKS] and json.dumps(kept)
    assert [r for result in kept.values() for r in result["decode"]] == records
    assert list(dict.fromkeys(r["work"] for r in records)) == list(bench_decode.WORKS)
    assert all(r["value"] > 0 and r["megabytes"] > 0 for r in records)
    table = report.decode_markdown([result | ORIGIN for result in kept.values()])
    assert [line.split(" | ")[0] for line in table.splitlines()[4:]] == [f"| {r['work']}" for r in records]
    shown = capsys.readouterr().out
    assert all(f"{r['value']:.4g} {r['unit']}" in shown and r["case"] in shown for r in records)


def test_a_peer_on_our_own_tensors_is_the_one_that_reads_our_checkpoint(tmp_path):
    pytest.importorskip("transformers")
    one = bench(tmp_path)
    model = one.model(TINY)
    from_disk, shared = one.transformers(TINY), decode_peers.Transformers(model, torch.float32)
    assert torch.equal(from_disk.logprobs([5, 6, 7]), shared.logprobs([5, 6, 7]))
    assert shared.model.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_one_set_of_weights_is_checked_against_transformers(tmp_path):
    pytest.importorskip("transformers")
    one = bench(tmp_path, peers=frozenset({"transformers"}))
    peer = one.transformers(TINY)
    assert peer.best(lambda: peer.generate([[5, 6]], 2)) in ("sdpa", "eager")
    whole = peer.generate([[1, 2, 3]], 4)
    assert len(whole.stamps[0]) == len(whole.tokens[0]) == 4 and whole.stamps[0] == sorted(whole.stamps[0])
    prompts, new = [[1, 2, 3], [7, 8, 9, 10, 11], [4]], [3, 2, 4]
    alone = [peer.generate([p], n).tokens[0] for p, n in zip(prompts, new, strict=True)]
    assert peer.static_batches(prompts, new, 2).tokens == alone  # padded; each as long as was asked for
    assert peer.continuous(prompts, new).tokens == alone
    (single,) = bench_decode.WORKS["single"](one)
    for r in (single, *bench_decode.prefill(one)):
        assert list(r["peers"]) == ["transformers"] and r["facts"]["attention of transformers"] in ("sdpa", "eager")
    with torch.no_grad():
        peer.model.model.layers[1].mlp.up_proj.weight[:40] *= 2
    with pytest.raises(AssertionError, match=r"from transformers'|greedy text"):
        decode_measure.check_transformers(one.engine(one.model(TINY), 128), peer)


def test_llama_cpp_has_our_weights_in_q4_0(tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    one = bench(tmp_path)
    decode_measure.check_llama(one)
    peer = one.llama()
    assert peer.facts == {"llama.cpp Q4_0": "16 tensors, 0.5 MB (embedding and head apart)"}
    done = peer.generate([1, 2, 3], 4)
    assert len(done.tokens[0]) == len(done.stamps[0]) == 4
    assert done.tokens[0][0] == int(peer.logits([1, 2, 3]).argmax())
    peer.close()
    monkeypatch.setattr(decode_measure, "q4_0_values", lambda p: p.roll(1, 0))  # other weights on our side
    with pytest.raises(AssertionError, match="have a cosine of"):
        decode_measure.check_llama(one)


def test_other_logprobs_than_the_trainers_are_noticed(tmp_path, monkeypatch):
    one = bench(tmp_path)
    engine = one.engine(one.model(TINY), 64)
    decode_measure.check_trainer(engine)
    served = decode_measure.serve

    def in_one_bit(*args, **more):
        done = served(*args, **more)
        done.logprobs[0][3] *= 1 + 2e-7
        return done

    monkeypatch.setattr(decode_measure, "serve", in_one_bit)
    with pytest.raises(AssertionError, match="not the trainer's"):
        decode_measure.check_trainer(engine)


def test_bytes_and_flops_are_those_of_the_shapes():
    specs = param_specs(TINY, Mesh.single(), resolve(TINY, decode_measure.PLAIN))
    elements = sum(s.shape[0] * s.shape[1] for s in specs.values() if len(s.shape) == 2)  # a tied head is the embedding
    assert bench_decode.matrix_elements(TINY) == elements
    assert bench_decode.weight_bytes(TINY, torch.bfloat16, False) == 2 * elements
    assert bench_decode.weight_bytes(TINY, torch.bfloat16, True) == elements * (1 / 2 + 4 / 64)
    of_cache = 2 * 2 * 2 * 64 * 4  # K and V, layers, heads, head_dim, bytes
    # tokens 2, 3 and 4 of a prompt of 5 read 6, 7 and 8 places
    assert bench_decode.single_bytes(TINY, torch.float32, False, 5, 4) == 4 * elements + 7.5 * of_cache
    assert bench_decode.batch_bytes(TINY, torch.float32, 4, [[0] * 5], [4]) == 4 * elements + (5 + 6 + 7 + 8) / 4 * of_cache
    head = 256 * 256
    scores = 3 * 4 * 64 * 4 * 2  # pairs of positions, heads, head_dim, two products of two operations, layers
    assert bench_decode.prefill_flops(TINY, 2) == 2 * 2 * (elements - head) + 2 * head + scores


def test_the_copying_model_copies():
    model = decode_variants.copying_model(TINY, torch.float32, "auto", 0)
    document = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:200]
    ids = torch.cat((document, document))
    with torch.no_grad():
        logits = model.logits(model(ids, torch.arange(400), torch.tensor([0, 400], dtype=torch.int32)))
    right = (logits[:-1].argmax(-1) == ids[1:]).float()
    assert right[201:].mean() > 0.9 and right[:199].mean() < 0.1


@pytest.mark.parametrize("choice", [None, {}])
def test_products_by_torch_give_the_same_text_in_their_own_bits(choice, monkeypatch, tmp_path):
    one, calls = bench(tmp_path), []
    plain, other = (one.engine(one.model(TINY), 64, 2) for _ in range(2))
    prompts, new = [[1, 2, 3], [9, 8]], [6, 6]
    expected = decode_measure.serve(plain, prompts, new)
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: calls.append(1) or mm(*a, **k))
    for _ in range(2):  # recorded, then run again
        before = len(calls)
        with decode_variants.vendor_products(choice):
            assert decode_measure.serve(other, prompts, new).tokens == expected.tokens
        if choice is None:
            assert len(calls) - before >= 15 * 6  # 14 linears and the head, each step
    if choice is not None:
        assert {key[1:] for key in choice} == {(256, 256), (128, 256)}  # of each weight's shape
    before = len(calls)
    assert decode_measure.serve(plain, prompts, new).tokens == expected.tokens and len(calls) == before


def test_unknown_works_and_dtypes_are_named(capsys):
    for options, arguments, message in (
        (Options(), ["--only", "nope"], "invalid choice: 'nope'"),
        (Options(device="cuda"), ["--only", "prefix"], "invalid choice: 'prefix'"),
        (Options(dtypes=("float64",)), [], "wants float32 or bfloat16"),
    ):
        with pytest.raises(SystemExit):
            bench_decode.run(options, arguments)
        assert message in capsys.readouterr().err
