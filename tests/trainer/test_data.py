"""Dataset files: every format, what each error says, truncation, sampling, held-out rows."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from swiftk.config import DataConfig
from swiftk.trainer.data import load_dataset, load_splits, token_statistics, trained_bytes
from swiftk.trainer.rows import RowError, read_rows, to_messages
from swiftk.trainer.template import Encoded
from swiftk.trainer.tokenizer import check_vocab, load_tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(["the question and the answer are here, one two three"] * 30, 280)
ROW = {"query": "q", "response": "r"}
WHO = ("system", "human", "gpt")
U, A, S = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "r"), ("system", "s")))


def jsonl(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read(*paths, **config):
    return read_rows(DataConfig(dataset=paths, **config))


# --- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [U, A]}, [U, A]),
        ({"messages": [S, U, A | {"loss": False}, U, A | {"loss": True}]}, [S, U, A | {"loss": False}, U, A | {"loss": True}]),
        ({"messages": [U | {"loss": None}, A], "system": "s"}, [S, U, A]),
        ({"messages": [S, U, A], "system": "other"}, [S, U, A]),
        ({"messages": json.dumps([U, A])}, [U, A]),
        ({"system": "s", "conversation": [{"human": "q", "assistant": "r"}] * 2}, [S, U, A, U, A]),
        ({"conversations": [{"from": who, "value": m["content"]} for who, m in zip(WHO, (S, U, A), strict=True)]}, [S, U, A]),
        ({"conversations": [U, A]}, [U, A]),
        (ROW, [U, A]),
        (ROW | {"system": "s"}, [S, U, A]),
        (ROW | {"system": None, "history": None, "input": None}, [U, A]),
        (ROW | {"history": [["q1", "r1"]]}, [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "r1"}, U, A]),
        ({"instruction": "a", "input": "b", "output": "r"}, [{"role": "user", "content": "a\nb"}, A]),
        ({"instruction": "q", "input": "", "output": "r"}, [U, A]),
        ({"instruction": "q", "output": "r"}, [U, A]),
        *(({key: "q", "response": "r"}, [U, A]) for key in ("prompt", "input", "instruction", "question", "problem")),
        *(({"query": "q", key: "r"}, [U, A]) for key in ("answer", "output", "targets", "text", "completion", "solution")),
        ({"problem": "q", "solution": "long", "answer": "r"}, [U, A]),
        (ROW | {"label": "sports", "id": 3}, [U, A]),
    ],
)  # fmt: skip
def test_formats(record, messages):
    assert to_messages(record, "sft") == messages
    if messages[0] != S:
        assert to_messages(record, "sft", system="s") == [S, *messages]


def test_formats_of_pretraining():
    assert to_messages({"text": "t"}, "pt", system="never used") == [{"role": "assistant", "content": "t"}]
    assert to_messages({"messages": [A, A]}, "pt") == [{"role": "assistant", "content": "r\nr"}]


@pytest.mark.parametrize(
    ("record", "stage", "message"),
    [
        ({"a": 1, "b": None, "c": ""}, "sft", r"fits no format, keys seen: 'a', 'c', 'b' \(null\); wants 'messages', 'query'"),
        ({}, "sft", "fits no format, keys seen: none"),
        ({"query": None, "response": "r"}, "sft", r"fits no format, keys seen: 'response', 'query' \(null\); wants"),
        ({"query": "q", "response": None}, "sft", r"has no reply \(roles user; 'response' is null\): prompts belong"),
        ({"messages": [U, A], "rejected_response": "x"}, "sft", "'rejected_response' makes this a preference row: stage dpo"),
        (ROW | {"rejected": "x"}, "sft", "stage dpo is not there yet"),
        ({"messages": [U, A], "label": True}, "sft", "a KTO row: stage kto is not there yet"),
        ({"messages": [S, U], "solution": "x"}, "sft", r"has no reply \(roles system, user\): prompts belong to stage grpo"),
        ({"query": "q"}, "sft", "prompts belong to stage grpo, which is not there yet"),
        ({"instruction": "q", "instances": []}, "sft", r"a query \(instruction\) and no response, keys seen: 'instruction'"),
        ({"query": "q", "history": [["a", "b"]]}, "sft", "has a history and no response"),
        ({"text": "t"}, "sft", "has only 'text', .* use --stage pt"),
        (ROW, "pt", "is a conversation, stage pt wants 'text' .* use --stage sft"),
        ({"messages": [U, A | {"content": " "}]}, "sft", r"message 2 \(assistant\) is empty"),
        ({"text": "\n"}, "pt", r"message 1 \(assistant\) is empty"),
        ({"query": "q", "response": 4}, "sft", "response is int 4, wants text"),
        ({"messages": {}}, "sft", "messages is dict {}, wants a list"),
        ({"messages": []}, "sft", "has no messages"),
        ({"messages": ["q"]}, "sft", "messages 1 is str 'q', wants an object"),
        ({"messages": [U, {"role": "asistant", "content": "r"}]}, "sft", "2 has role str 'asistant', wants one of system"),
        ({"messages": [U, A | {"tool_calls": [1]}]}, "sft", "messages 2 has 'tool_calls', which would be lost"),
        ({"messages": [U, {"role": "assistant"}]}, "sft", "messages 2 has keys 'role', wants 'role' and 'content'"),
        ({"messages": [U, A | {"content": [{"type": "text"}]}]}, "sft", "messages 2 is list .*, wants text"),
        ({"messages": [U, A | {"loss": 1}]}, "sft", "messages 2 has loss int 1, wants true or false"),
        ({"messages": "[{"}, "sft", "messages is text that is not JSON"),
        (ROW | {"history": [["a"]]}, "sft", r"history 1 is list \['a'\], wants \[query, response\]"),
        ({"query": "\ud83d", "response": "r"}, "sft", r"message 1 \(user\) has half of a surrogate pair"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(record, stage, message):
    with pytest.raises(RowError, match=message):
        to_messages(record, stage)


GOOD = json.dumps(ROW).encode() + b"\n"


# --- files -------------------------------------------------------------------------------------------------------


def test_one_table_in_every_kind_of_file(tmp_path):
    table = [
        {"query": f'q{i}, "quoted"\nnext\u2028line ä', "response": f"r{i}", "system": None if i else "s"} for i in range(5)
    ]
    jsonl(tmp_path, *table)
    (tmp_path / "array.json").write_text("\ufeff" + json.dumps(table, indent=1, ensure_ascii=False), "utf-8")
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in table) + "\n\n", "utf-8")
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "rows.parquet", row_group_size=2)
    want = [row.messages for row in read(str(tmp_path / "rows.jsonl"))[0]]
    assert len(want) == 5 and want[0][0] == S and want[1][0]["content"].endswith("line ä")
    for name in ("array.json", "lines.json", "rows.csv", "rows.parquet"):
        rows, skipped = read(str(tmp_path / name))
        assert [row.messages for row in rows] == want and not skipped, name
    sources = {
        name: [row.source for row in read(str(tmp_path / name))[0]][1]
        for name in ("rows.jsonl", "array.json", "rows.csv", "rows.parquet")
    }
    assert list(sources.values()) == ["rows.jsonl line 2", "array.json line 7", "rows.csv line 4", "rows.parquet row 2"]
    nested = [{"messages": [U, A | {"loss": False}]}, {"messages": [S, U, A]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nested), tmp_path / "nested.parquet")
    assert [row.messages for row in read(str(tmp_path / "nested.parquet"))[0]] == [row["messages"] for row in nested]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "rows.jsonl is empty"),
        ("rows.jsonl", b"\n \n", "rows.jsonl has no rows"),
        ("rows.jsonl", GOOD + b'\n{"query": "q", "respo', "line 3 is not JSON .*: str '{.*respo'; the file ends in the mid"),
        ("rows.jsonl", b'{"query": "q", "response": "cut o\n' + GOOD, r"line 1 is not JSON \(Unterminated .*: str '{.*cut o'"),
        ("rows.jsonl", GOOD + b'query,response\n', "line 2 is not JSON .* 'query,response'"),
        ("rows.jsonl", b'["a"]\n', r"line 1 is list \['a'\], wants an object"),
        ("rows.jsonl", b'{"query": "\xff"}\n', "line 1 is not UTF-8: byte 0xff at position 11"),
        ("rows.jsonl", b'{"query": "q", "reply": "r"}\n', "line 1 has a query .* keys seen: 'query', 'reply'"),
        ("rows.json", b'[{"query": "q",\n "response": "r"},\n {"query": "q', "line 3 is not JSON .*, in the entry at line 3"),
        ("rows.json", b'[{"query": "q", "response": "r"}', r"line 1 is not JSON \(the file is cut off\)"),
        ("rows.json", b'[{"query": "q", "response": "r"} {}]', "line 1 is not JSON .*expected ',' or ']'"),
        ("rows.json", b"[]", "rows.json has no rows"),
        ("rows.csv", b"query,response\n", "rows.csv has no rows"),
        ("rows.csv", b"query,response\na,b\na,b,c\n", "line 3 has 3 cells, the header has 2"),
        ("rows.csv", b"query,query\na,b\n", "line 1 names a column twice"),
        ("rows.csv", b'query,response\na,"b\n', "line 2 is not CSV"),
        ("rows.csv", b"query,response\na,\xff\n", "is not UTF-8"),
        ("rows.parquet", b"PAR1 no", "is not a whole parquet file"),
        ("rows.txt", b"text", "is plain text, stage sft wants conversations; use --stage pt"),
        ("rows.yaml", b"a: 1", "ends in '.yaml', wants one of .jsonl, .json, .csv, .parquet, .txt"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(str(tmp_path / name))
    assert str(error.value).startswith(f"dataset: {tmp_path / name}")


def test_missing_files_name_their_neighbours(tmp_path):
    jsonl(tmp_path, ROW, name="train.jsonl")
    with pytest.raises(ValueError, match=r"trian.jsonl is not there; near it: train.jsonl"):
        read(str(tmp_path / "trian.jsonl"))
    with pytest.raises(ValueError, match="near it: python-stdlib-docstrings"):
        read("python-docstrings")
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere either"):
        read(str(tmp_path / "nowhere" / "train.jsonl"))
    with pytest.raises(ValueError, match=r"is a folder, wants a file such as train.jsonl"):
        read(str(tmp_path))
    with pytest.raises(ValueError, match="no file given"):
        read()
    with pytest.raises(ValueError, match="stage: 'dpo' is not there yet"):
        read("x", stage="dpo")


def test_strict_false_skips_and_counts(tmp_path):
    path = jsonl(tmp_path, ROW, "{", {"a": 1}, ROW)
    with pytest.raises(ValueError, match=r"line 2 .*; --strict false skips such rows and counts them"):
        read(path)
    rows, skipped = read(path, strict=False)
    assert [row.source for row in rows] == ["rows.jsonl line 1", "rows.jsonl line 4"]
    assert [reason[:17] for reason in skipped] == ["rows.jsonl line 2", "rows.jsonl line 3"]
    dataset = load_dataset(DataConfig(dataset=(path,), strict=False), TOKENIZER, 64)
    assert (dataset.report["read"], dataset.report["skipped"], dataset.report["rows"]) == (4, 2, 2)
    with pytest.raises(ValueError, match=r"no rows are left: 1 read, 1 skipped \(first: bad.jsonl line 1 fits no format"):
        load_dataset(DataConfig(dataset=(jsonl(tmp_path, {"a": 1}, name="bad.jsonl"),), strict=False), TOKENIZER, 64)


def test_columns(tmp_path):
    path = jsonl(tmp_path, {"ask": "q", "tell": "r"}, {"ask": "q", "tell": "r", "x": 1})
    assert [row.messages for row in read(path, columns={"ask": "query", "tell": "response"})[0]] == [[U, A]] * 2
    path = jsonl(tmp_path, {"question": "q", "answer": "r", "tell": "other"})
    assert read(path, columns={"tell": "response"})[0][0].messages[1]["content"] == "other"
    with pytest.raises(ValueError, match=r"columns: 'anwser' is in no row, the files have 'answer', .*; did you mean 'answer'"):
        read(path, columns={"anwser": "response"})
    with pytest.raises(ValueError, match="line 1 has two columns named 'answer' after --columns"):
        read(path, columns={"tell": "answer"})
    assert read(path, columns={"answer": "question", "question": "answer"})[0][0].messages[0]["content"] == "r"  # a swap


def test_sampling(tmp_path):
    path = jsonl(tmp_path, *({"query": f"q{i}", "response": "r"} for i in range(50)))
    picked = [row.source for row in read(f"{path}#10")[0]]
    assert len(set(picked)) == 10 and picked == sorted(picked, key=lambda s: int(s.split()[-1]))
    assert [row.source for row in read(f"{path}#10")[0]] == picked
    assert [row.source for row in read(f"{path}#10", seed=1)[0]] != picked
    assert len(read(f"{path}#50", path)[0]) == 100
    for wanted in (51, 0):
        with pytest.raises(ValueError, match=f"#{wanted} wants {wanted} rows, .*rows.jsonl has 50"):
            read(f"{path}#{wanted}")
    hashed = jsonl(tmp_path, ROW, name="rows#1.jsonl")  # a name of its own
    assert len(read(hashed)[0]) == 1
    for suffix in ("json", "csv", "parquet"):
        table = [{"query": f"q{i}", "response": "r"} for i in range(50)]
        other = tmp_path / f"rows.{suffix}"
        if suffix == "json":
            other.write_text(json.dumps(table))
        elif suffix == "csv":
            other.write_text("query,response\n" + "".join(f"q{i},r\n" for i in range(50)))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), other)
        assert len(read(f"{other}#10")[0]) == 10


# --- encoding ----------------------------------------------------------------------------------------------------


def sized(folder, *lengths):
    """Rows of so many tokens: replies of one token a digit."""
    base = len(
        load_dataset(DataConfig(dataset=(jsonl(folder, {"query": "q", "response": "1"}),)), TOKENIZER, 99).rows[0].input_ids
    )
    assert min(lengths) >= base
    return jsonl(folder, *({"query": "q", "response": "1" * (n - base + 1)} for n in lengths))


def test_truncation(tmp_path):
    path = sized(tmp_path, 25, 30, 40, 60)
    load = lambda strategy, limit=40: load_dataset(DataConfig(dataset=(path,), truncation_strategy=strategy), TOKENIZER, limit)  # noqa: E731
    whole = load(None, 60)
    assert whole.lengths.tolist() == [25, 30, 40, 60] and whole.report["too_long"] == 0
    assert load(None).lengths.tolist() == load("delete").lengths.tolist() == [25, 30, 40]
    assert load("delete").report["too_long"] == load("right").report["cut"] == 1
    assert load("left").report["lost_tokens"] == 20 and "lost_tokens" not in load("delete").report
    for strategy, part in (("right", slice(None, 40)), ("left", slice(20, None))):
        row = load(strategy).rows[3]
        assert row.input_ids.tolist() == whole.rows[3].input_ids[part].tolist()
        assert row.loss_mask.tolist() == whole.rows[3].loss_mask[part].tolist()
    rows = jsonl(tmp_path, {"query": "q" * 60, "response": "r"}, ROW)  # cut inside its prompt, the first has nothing to train
    cut = load_dataset(DataConfig(dataset=(rows,), truncation_strategy="right"), TOKENIZER, 40)
    assert (cut.report["cut"], cut.report["untrained"], cut.report["rows"]) == (1, 1, 1)


def test_no_row_left(tmp_path):
    path = sized(tmp_path, 25, 30)
    message = r"no rows are left: 2 read, 2 longer than max_length 10 \(the shortest has 25; raise --max_length or use"
    with pytest.raises(ValueError, match=message):
        load_dataset(DataConfig(dataset=(path,), max_length=10), TOKENIZER, 10)
    message = r"2 longer than the model's limit of 10 tokens \(the shortest has 25; use --truncation_strategy right\)"
    with pytest.raises(ValueError, match=message):  # a higher max_length would not help
        load_dataset(DataConfig(dataset=(path,), max_length=99), TOKENIZER, 10)
    with pytest.raises(ValueError, match="2 without a token to train"):
        load_dataset(DataConfig(dataset=(path,), truncation_strategy="right"), TOKENIZER, 3)
    silent = jsonl(tmp_path, {"messages": [U, A | {"loss": False}]})
    with pytest.raises(ValueError, match="no rows are left: 1 read, 1 without a token to train"):
        load_dataset(DataConfig(dataset=(silent,)), TOKENIZER, 64)
    for config, message in (
        (DataConfig(dataset=(path,), truncation_strategy="middle"), "truncation_strategy: 'middle' is unknown"),
        (DataConfig(dataset=(path,), truncation_strategy="split"), "split cuts documents of stage pt"),
    ):
        with pytest.raises(ValueError, match=message):
            load_dataset(config, TOKENIZER, 64)
    with pytest.raises(ValueError, match="max_length: 1 tokens hold nothing"):
        load_dataset(DataConfig(dataset=(path,)), TOKENIZER, 1)


def test_a_text_file_is_one_document_cut_into_pieces(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("the question and the answer\n\n" * 40)
    config = DataConfig(stage="pt", dataset=(str(path),))
    dataset = load_dataset(config, TOKENIZER, 32)
    whole = [*TOKENIZER(path.read_text())["input_ids"], TOKENIZER.eos_token_id]
    assert set(dataset.lengths[:-1]) == {32} and all(row.loss_mask.all() for row in dataset.rows)
    labels = np.concatenate([row.input_ids[1:] for row in dataset.rows])
    assert [whole[0], *labels.tolist()] == whole  # each token but the first is a label, once
    assert dataset.report["trained_tokens"] == len(whole) - 1 and dataset.report["cut"] == 1
    exact = load_dataset(config, TOKENIZER, len(whole))
    assert exact.lengths.tolist() == [len(whole)] and exact.report["cut"] == 0
    one = DataConfig(stage="pt", dataset=(str(path),), split_dataset_ratio=0.2, truncation_strategy="right")
    with pytest.raises(ValueError, match=r"there is one row, .*; --truncation_strategy split makes rows of a long text"):
        load_splits(one, TOKENIZER, 32)
    with pytest.raises(ValueError, match=rf"there is one row, .*; a --max_length below its {len(whole)} tokens"):
        load_splits(one, TOKENIZER, len(whole))
    for limit in (len(whole) - 1, 2, 3):
        pieces = load_dataset(config, TOKENIZER, limit).rows
        assert [whole[0], *np.concatenate([row.input_ids[1:] for row in pieces]).tolist()] == whole
    train, held = load_splits(DataConfig(stage="pt", dataset=(str(path),), split_dataset_ratio=0.2), TOKENIZER, 32)
    assert len(train.rows) + len(held.rows) == len(dataset.rows) and len(held.rows) == round(0.2 * len(dataset.rows))
    with pytest.raises(ValueError, match=r"#2 wants 2 rows, .* has 1"):
        read(f"{path}#2", stage="pt")


def test_held_out_rows(tmp_path):
    path = jsonl(tmp_path, *({"query": f"q{i}", "response": "r"} for i in range(40)))
    config = DataConfig(dataset=(path,), split_dataset_ratio=0.1)
    train, held = load_splits(config, TOKENIZER, 64)
    sources = [row.source for row in train.rows], [row.source for row in held.rows]
    assert len(sources[1]) == 4 and sorted(sources[0] + sources[1]) == sorted(row.source for row in read(path)[0])
    assert [row.source for row in load_splits(config, TOKENIZER, 64)[1].rows] == sources[1]
    assert train.report["rows"] == 36 and held.report["tokens"] == held.lengths.sum() and held.report["held_out"] == 4
    assert len(load_splits(DataConfig(dataset=(path,), split_dataset_ratio=1e-9), TOKENIZER, 64)[1].rows) == 1
    assert load_splits(DataConfig(dataset=(path,)), TOKENIZER, 64)[1] is None
    val = jsonl(tmp_path, ROW, name="val.jsonl")
    train, held = load_splits(DataConfig(dataset=(path,), val_dataset=(val,)), TOKENIZER, 64)
    assert len(train.rows) == 40 and [row.source for row in held.rows] == ["val.jsonl line 1"]
    for ratio, data, message in ((1.0, path, "wants 0 <= ratio < 1"), (0.5, val, "there is one row")):
        with pytest.raises(ValueError, match=message):
            load_splits(DataConfig(dataset=(data,), split_dataset_ratio=ratio), TOKENIZER, 64)


def test_rows_a_template_refuses_follow_strict(tmp_path):
    tokenizer = train_tokenizer(["text"] * 9, 259)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no bad') }}{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    path = jsonl(tmp_path, ROW, {"query": "bad", "response": "r"})
    with pytest.raises(ValueError, match=r"dataset: rows.jsonl line 2 is refused by the chat template: no bad; --strict false"):
        load_dataset(DataConfig(dataset=(path,)), tokenizer, 64)
    report = load_dataset(DataConfig(dataset=(path,), strict=False), tokenizer, 64).report
    assert (report["read"], report["skipped"], report["rows"]) == (2, 1, 1)


def test_bytes_and_statistics():
    ids = TOKENIZER("xyä🙂")["input_ids"]
    rows = [Encoded(np.array([5, *ids, TOKENIZER.convert_tokens_to_ids("<|im_end|>")], np.int32), np.ones(len(ids) + 2, bool))]
    assert trained_bytes(rows, TOKENIZER) == len("xyä🙂".encode())
    rows[0].loss_mask[1] = False
    assert trained_bytes(rows * 2, TOKENIZER) == 2 * len("yä🙂".encode())
    assert token_statistics(np.array([1, 2, 3, 10])) == {
        "rows": 4, "sum": 16, "min": 1, "mean": 4.0, "median": 2.5, "p95": pytest.approx(8.95), "max": 10,
    }  # fmt: skip


# --- tokenizer ---------------------------------------------------------------------------------------------------


def test_tokenizer_is_deterministic_and_survives_its_folder(tmp_path):
    texts = ["def f(x): return x", "the answer äöü 漢字 🙂"] * 20
    one, two = train_tokenizer(texts, 290), train_tokenizer(iter(texts), 290)
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str() and len(one) == 290
    one.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "unseen  \n\t bytes: \x00 ß 🐍"
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.get_vocab() == one.get_vocab() and loaded.chat_template == one.chat_template
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    prompt = loaded.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.convert_ids_to_tokens(loaded("<|im_start|>")["input_ids"]) == ["<|im_start|>"]


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match="vocab_size has 200, wants at least 259"):
        train_tokenizer(["a"], 200)
    with pytest.raises(ValueError, match="the texts give 259 tokens, vocab_size wants 4096"):
        train_tokenizer(["a"], 4096)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has none of tokenizer.json, tokenizer.model, vocab.json; copy"):
        load_tokenizer(tmp_path)
    check_vocab(TOKENIZER, 280)
    with pytest.raises(ValueError, match=r"token '.*' has id 279, the model's vocab_size is 270 and the tokenizer's 280"):
        check_vocab(TOKENIZER, 270)
