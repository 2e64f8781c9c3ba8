"""The command line: one prompt, files and their going on, conversations, wrong input."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftk import generate
from swiftk.decoder.engine import Engine
from swiftk.decoder.params import SamplingParams
from swiftk.decoder.text import chat_tokens
from swiftk.decoder_arguments import name_of, named_adapters
from tests.decoder.tiny import write_adapter, write_checkpoint

SMALL = ["--torch_dtype", "float32", "--max_num_seqs", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def engine(model, adapter) -> Engine:
    return Engine(model, torch_dtype="float32", max_num_seqs=4, adapters={"poet": adapter})


def run(model: Path, *argv: object) -> int:
    return generate.main(["--model", str(model), *SMALL, *map(str, argv)])


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def user(engine: Engine, text: str) -> list[int]:
    assert engine.tokenizer is not None
    return chat_tokens(engine.tokenizer, [{"role": "user", "content": text}])


def params(**values) -> SamplingParams:
    """As chats have them: the template's end of a turn ends them too. 0: <|endoftext|>, 2: <|im_end|>."""
    return SamplingParams(stop_token_ids=(0, 2), **values)


def test_a_prompt_is_printed(model, engine, capsys):
    assert run(model, "--prompt", "hello", "--seed", 3, "--max_tokens", 12) == 0
    out = capsys.readouterr().out
    assert out == engine.generate([user(engine, "hello")], params(seed=3, max_tokens=12))[0].outputs[0].text + "\n"
    assert run(model, "--prompt", "hello", "--seed", 3, "--max_tokens", 12, "--chat", "false") == 0
    raw = engine.generate("hello", SamplingParams(seed=3, max_tokens=12))[0].outputs[0].text
    assert capsys.readouterr().out == raw + "\n" != out
    assert run(model, "--prompt", "hello", "--seed", 3, "--max_tokens", 12, "--n", 2) == 0
    both = engine.generate([user(engine, "hello")], params(seed=3, max_tokens=12, n=2))[0].outputs
    assert capsys.readouterr().out == f"--- 1 of 2\n{both[0].text}\n--- 2 of 2\n{both[1].text}\n"


def test_an_output_without_a_given_length_fits_the_context(model, capsys):
    assert run(model, "--prompt", "hello", "--ignore_eos", "true") == 0
    assert run(model, "--prompt", "hello " * 300) == 2
    assert "max_model_len 256" in capsys.readouterr().err


ROWS: list[dict[str, object]] = [
    {"prompt": "hello", "answer": 42},
    {"prompt": "the quick", "max_tokens": 30},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}], "temperature": 0},
    {"prompt": [5, 6, 7], "seed": 9, "n": 2},
    {"prompt": "hello", "adapter": "poet"},
    {"prompt": "lazy", "stop": "e", "include_stop_str_in_output": True, "logprobs": 1, "prompt_logprobs": 0},
]


def test_a_file_of_prompts(model, adapter, engine, tmp_path, capsys):
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "new" / "out.jsonl"
    argv = ["--prompts", rows, "--output", out, "--adapters", adapter, "--adapter", "base", "--max_tokens", 8, "--seed", 1]
    assert run(model, *argv) == 0
    found = read_rows(out)
    assert [row["index"] for row in found] == list(range(6)) and [row["input"] for row in found] == ROWS
    assert "6/6 rows" in capsys.readouterr().err

    def check(index: int, prompt: list[int], wanted: SamplingParams, adapter: str | None = None) -> dict:
        done = engine.generate([prompt], wanted, adapter=adapter)[0]
        assert [o["text"] for o in found[index]["outputs"]] == [o.text for o in done.outputs]
        assert [o["finish_reason"] for o in found[index]["outputs"]] == [o.finish_reason for o in done.outputs]
        assert found[index]["num_prompt_tokens"] == len(prompt)
        if done.outputs[0].logprobs is not None:
            assert done.prompt_logprobs is not None
            written, prompts = found[index]["outputs"][0]["logprobs"], found[index]["prompt_logprobs"]
            assert [x["logprob"] for x in written] == [x.logprob for x in done.outputs[0].logprobs]
            assert [x and x["logprob"] for x in prompts] == [x and x.logprob for x in done.prompt_logprobs]
        return found[index]

    check(0, user(engine, "hello"), params(seed=1, max_tokens=8))
    check(1, user(engine, "the quick"), params(seed=2, max_tokens=30))
    check(2, chat_tokens(engine.tokenizer, ROWS[2]["messages"]), params(seed=3, max_tokens=8, temperature=0.0))  # type: ignore[arg-type]
    check(3, [5, 6, 7], SamplingParams(seed=9, max_tokens=8, n=2))
    assert check(4, user(engine, "hello"), params(seed=5, max_tokens=8), "poet")["outputs"] != found[0]["outputs"]
    stop = params(seed=6, max_tokens=8, stop=("e",), include_stop_str_in_output=True, logprobs=1, prompt_logprobs=0)
    check(5, user(engine, "lazy"), stop)


def test_a_half_written_file_is_gone_on_with(model, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"hello {i}", "max_tokens": 4 + 3 * (i % 3)} for i in range(9)])
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert run(model, "--prompts", rows, "--output", whole, "--seed", 1) == 0
    text = whole.read_bytes()
    ends = [i + 1 for i, c in enumerate(text) if c == ord("\n")]
    for cut in (0, 1, ends[0] - 1, ends[0], ends[4] + 20, len(text) - 1, len(text)):
        part.write_bytes(text[:cut])
        assert run(model, "--prompts", rows, "--output", part, "--seed", 1) == 0
        assert part.read_bytes() == text, cut
    # rows that are there are kept, not made again: in any order, and only the missing ones are computed
    mine = [json.dumps({**json.loads(line), "mine": True}).encode() + b"\n" for line in text.splitlines()]
    part.write_bytes(mine[7] + mine[2])
    assert run(model, "--prompts", rows, "--output", part, "--seed", 1) == 0
    assert [row.get("mine", False) for row in read_rows(part)] == [i in (2, 7) for i in range(9)]
    assert "2 of 9 rows are in" in capsys.readouterr().err


def test_an_output_of_something_else_is_refused(model, adapter, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    out = tmp_path / "out.jsonl"
    assert run(model, "--prompts", rows, "--output", out, "--max_tokens", 2) == 0
    before = out.read_bytes()
    out.write_bytes(before + b'{"torn')

    def refused(text: str, *argv: object) -> None:
        capsys.readouterr()
        assert run(model, "--prompts", rows, "--output", out, *argv) == 2
        assert text in capsys.readouterr().err and out.read_bytes() == before + b'{"torn'

    other = "was made of another row, model or parameter"
    refused(other)
    refused(other, "--max_tokens", 2, "--temperature", 0.5)
    refused(other, "--max_tokens", 2, "--adapters", adapter)
    write_rows(rows, [{"prompt": "a"}, {"prompt": "c"}])
    refused("line 2 " + other, "--max_tokens", 2)
    write_rows(rows, [{"prompt": "a"}])
    refused("line 2 " + other, "--max_tokens", 2)
    out.write_bytes(b"1\n")
    capsys.readouterr()
    assert run(model, "--prompts", rows, "--output", out) == 2
    assert "line 1 is no row of swiftk.generate" in capsys.readouterr().err and out.read_bytes() == b"1\n"


def test_ctrl_c_keeps_what_is_done(model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"hello {i}", "max_tokens": 2 if i < 2 else 100} for i in range(12)])
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    argv = ["--seed", "1", "--ignore_eos", "true", "--prompts", str(rows)]
    command = [sys.executable, "-m", "swiftk.generate", "--model", str(model), *SMALL, *argv, "--output", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not out.exists() or not out.read_bytes():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    error = process.stderr.read()
    assert process.wait() == 130 and "the same command goes on" in error and "Traceback" not in error
    assert 1 <= len(read_rows(out)) < 12 and out.read_bytes().endswith(b"\n")
    assert run(model, *argv, "--output", out) == 0 and run(model, *argv, "--output", whole) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_a_conversation(model, engine, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nand you?\n/clear\nand you?\n/exit\nnot read\n"))
    assert run(model, "--temperature", 0, "--max_tokens", 6, "--system", "be brief") == 0
    turns: list[dict[str, str]] = [{"role": "system", "content": "be brief"}]
    wanted = ""
    for text in ("hello", "and you?", "and you?"):
        if wanted.count("\n") == 2:
            turns = turns[:1]
        turns.append({"role": "user", "content": text})
        done = engine.generate([chat_tokens(engine.tokenizer, turns)], params(max_tokens=6, temperature=0.0))[0].outputs[0]
        turns.append({"role": "assistant", "content": done.text})
        wanted += done.text + "\n"
    assert "\n" not in wanted.replace("\n", "", 3)  # each reply is one line, or the count above is wrong
    assert capsys.readouterr().out == wanted


def test_a_conversation_goes_on_after_what_does_not_fit(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello " * 400 + "\nhello\n"))
    assert run(model, "--max_tokens", 4, "--seed", 1) == 0
    captured = capsys.readouterr()
    assert "max_model_len 256" in captured.err and captured.out.count("\n") == 1


def test_wrong_input(model, adapter, tmp_path, capsys):
    good = write_rows(tmp_path / "good.jsonl", [{"prompt": "a"}])
    out = tmp_path / "out.jsonl"
    cases: list[tuple[str, list[object]]] = [
        ("prompt and prompts are both given", ["--prompt", "a", "--prompts", good]),
        ("prompts and output belong together", ["--prompts", good]),
        ("which is the file of prompts", ["--prompts", good, "--output", good]),
        ("is not there, wants a jsonl file", ["--prompts", tmp_path / "no.jsonl", "--output", out]),
        ("logprobs and prompt_logprobs are written to files", ["--prompt", "a", "--logprobs", 1]),
        ("n: has 2, a conversation wants 1", ["--n", 2]),
        ("'nobody'", ["--prompt", "a", "--adapter", "nobody"]),
        ("no_folder is not a folder", ["--prompt", "a", "--adapters", "no_folder"]),
        ("two are called 'poet'", ["--prompt", "a", "--adapters", adapter, adapter]),
        ("--adapters A=DIR, or base", ["--prompt", "a", "--adapters", f"a={adapter}", f"b={adapter}"]),
        ("threads: has 0", ["--prompt", "a", "--threads", 0]),
        ("max_num_seqs: has 0, wants at least 1", ["--prompt", "a", "--max_num_seqs", 0]),
        ("has no config.json", ["--model", tmp_path, "--prompt", "a"]),
        ("nowhere is not a folder", ["--model", "nowhere", "--prompt", "a"]),
        ("system: is given, wants --chat true", ["--prompt", "a", "--system", "s", "--chat", "false"]),
        ("prompt: has no tokens", ["--prompt", "", "--chat", "false"]),
    ]
    for text, argv in cases:
        wanted = text.replace("--adapters A=DIR, or base", "adapter: is not given, wants one of a, b, or base")
        assert run(model, *argv) == 2, text
        error = capsys.readouterr().err
        assert wanted in error and error.startswith("swiftk.generate: ") and error.count("\n") == 1, error
    rows: list[tuple[str, object]] = [
        ("line 1: has the keys text, wants 'prompt' or 'messages'", {"text": "a"}),
        ("wants 'prompt' or 'messages'", {"prompt": "a", "messages": []}),
        ("line 1: is '[1]', wants an object", [1]),
        ("has 'temprature', which is no key; did you mean 'temperature'?", {"prompt": "a", "temprature": 0}),
        ("temperature: has 'hot', wants a number", {"prompt": "a", "temperature": "hot"}),
        ("max_tokens: has 1.5, wants an integer", {"prompt": "a", "max_tokens": 1.5}),
        ("ignore_eos: has 1, wants true or false", {"prompt": "a", "ignore_eos": 1}),
        ("stop: has [''], wants a string", {"prompt": "a", "stop": [""]}),
        ("logit_bias: has {'x': 1}, wants a mapping", {"prompt": "a", "logit_bias": {"x": 1}}),
        ("adapter: has 'x', wants base", {"prompt": "a", "adapter": "x"}),
        ("messages: has [], wants", {"messages": []}),
        ("prompt: has {}, wants text or a list", {"prompt": {}}),
        ("max_tokens 400", {"prompt": "a", "max_tokens": 400}),
        ("prompt: has token 328", {"prompt": [328]}),
    ]
    for text, row in rows:
        write_rows(good, [row])
        assert run(model, "--prompts", good, "--output", out) == 2, text
        error = capsys.readouterr().err
        assert text in error and f"prompts: {good} line 1" in error and error.count("\n") == 1, error
    good.write_text('{"prompt": "a"}\n' + "[" * 100_000)
    assert run(model, "--prompts", good, "--output", out) == 2
    assert "line 2 is not JSON" in capsys.readouterr().err
    good.write_text('{"prompt": "a"}\n{"prompt"')
    assert run(model, "--prompts", good, "--output", out) == 2
    assert "line 2 is not JSON" in capsys.readouterr().err
    assert not out.exists()


def test_the_text_of_an_abort_is_that_of_its_tokens(model):
    """What may have been the beginning of a stop string is not lost."""
    engine = Engine(model, torch_dtype="float32", max_num_seqs=4)
    params = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)
    text = engine.generate("the quick", params)[0].outputs[0].text
    got, id = "", engine.add("the quick", dataclasses.replace(params, stop=(text + "!",)))  # all of it is held back
    for _ in range(11):
        got += "".join(update.text for update in engine.step())
    engine.abort(id)
    (last,) = engine.step()
    assert not got and last.finish_reason == "abort" and len(last.text) > 5 and text.startswith(last.text.rstrip("\ufffd"))


def test_nan_is_null(tmp_path, capsys):
    """Of a model that has gone wrong: whatever reads JSON reads the row."""
    broken = write_checkpoint(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    rows, output = write_rows(tmp_path / "in.jsonl", [{"prompt": [5, 6], "prompt_logprobs": 1}]), tmp_path / "out.jsonl"
    assert run(broken, "--prompts", rows, "--output", output) == 1
    assert "1 rows have the finish_reason error" in capsys.readouterr().err
    (row,) = (json.loads(line, parse_constant=pytest.fail) for line in output.read_text().splitlines())
    assert row["outputs"][0]["finish_reason"] == "error" and row["prompt_logprobs"][1]["logprob"] is None


def test_only_a_newline_ends_a_row(model, tmp_path):
    """Texts of the web have other separators of lines in them; JSON lets them stand."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    given = [{"prompt": "the\u2028quick\x85brown"}, {"prompt": "fox"}]
    rows.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in given), encoding="utf-8", newline="")
    assert run(model, "--prompts", rows, "--output", out, "--max_tokens", 2) == 0
    assert [json.loads(line)["input"] for line in out.read_bytes().split(b"\n")[:-1]] == given


def test_wrong_keys(model, capsys):
    for text, argv in [
        ("--temprature is no key; did you mean --temperature?", ["--temprature", "0"]),
        ("--top-p is no key; did you mean --top_p?", ["--top-p", "0.5"]),
        ("invalid float value: 'hot'", ["--temperature", "hot"]),
        ("wants true or false", ["--chat", "maybe"]),
        ("wants JSON", ["--logit_bias", "{"]),
    ]:
        with pytest.raises(SystemExit) as exit:
            run(model, *argv)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and text in error and error.count("\n") == 1, error
    with pytest.raises(SystemExit) as exit:
        generate.main(["--help"])
    assert exit.value.code == 0 and "--min_p" in capsys.readouterr().out


def test_the_base_is_the_one_that_the_adapter_names(model, adapter, engine, capsys):
    assert generate.main(["--adapters", str(adapter), *SMALL, "--prompt", "hello", "--seed", "3", "--max_tokens", "8"]) == 0
    wanted = engine.generate([user(engine, "hello")], params(seed=3, max_tokens=8), adapter="poet")[0].outputs[0].text
    assert capsys.readouterr().out == wanted + "\n"


def test_names_of_adapters(tmp_path):
    one, two = tmp_path / "one", tmp_path / "a=b"
    one.mkdir()
    two.mkdir()
    assert named_adapters([str(one), f"x={one}", str(two)]) == {"one": str(one), "x": str(one), "a=b": str(two)}
    with pytest.raises(ValueError, match="'base' is no name"):
        named_adapters([f"base={one}"])


def test_two_processes_do_not_share_an_output(model, tmp_path, capsys):
    rows, out = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    with generate.opened(str(out)):
        assert run(model, "--prompts", rows, "--output", out) == 2
    assert "another process is writing" in capsys.readouterr().err


def test_a_text_does_not_drive_the_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    text = "a\x1b[2J\r\x9b\x7fb\n\té"
    assert generate.shown(text, Terminal()) == "a\u241b[2J\u240d\ufffd\ufffdb\n\té"
    assert generate.shown(text, io.StringIO()) == text


def test_adapters_that_were_trained_over_nf4_get_it(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base", hidden_size=64, intermediate_size=64)
    adapter = write_adapter(base, tmp_path / "quantised")
    (adapter / "args.json").write_text(json.dumps({"arguments": {"quant_bits": 4}}))
    texts = {}
    for bits in (None, "4", "none"):
        argv = ["--adapters", adapter, "--prompt", "hello", "--temperature", 0, "--max_tokens", 24, "--ignore_eos", "true"]
        assert run(base, *argv, *(["--quant_bits", bits] if bits else [])) == 0
        captured = capsys.readouterr()
        texts[bits] = captured.out
        assert ("held in NF4, as the adapters were trained" in captured.err) == (bits is None)
    assert texts[None] == texts["4"] != texts["none"]


def test_names_of_checkpoints():
    found = {"a/poet": "poet", "a/poet/last": "poet", "a/poet/checkpoint-60": "poet", "checkpoint-x": "checkpoint-x"}
    assert {path: name_of(path) for path in found} == found


def test_an_adapter_of_another_base_is_said_to_be(model, tmp_path, capsys):
    other = write_checkpoint(tmp_path / "other")
    adapter = write_adapter(other, tmp_path / "poet")
    assert run(model, "--adapters", adapter, "--prompt", "hello", "--max_tokens", 2) == 0
    assert f"careful: the adapter poet names {other} as its base, and is put over {model}" in capsys.readouterr().err
    assert run(other, "--adapters", adapter, "--prompt", "hello", "--max_tokens", 2) == 0
    assert "careful" not in capsys.readouterr().err
