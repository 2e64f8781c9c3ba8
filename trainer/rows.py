"""Dataset files to rows of messages: every accepted format, and an error that names file, line and what was seen.

Files: jsonl, json (an array, or one object a line), csv, parquet; txt in stage pt (the whole file is one document, which
truncation_strategy split cuts into pieces); or a builtin name. `path#N` takes N rows, chosen by the seed, in file order.

Formats, tried in this order; None and, in csv, empty cells count as absent:
  {"messages": [{"role", "content", "loss"?: bool}]}
  {"conversation" or "conversations": [{"human", "assistant"} or {"from", "value"}], "system"?}
  {"text"}                                             stage pt; also messages of assistants alone
  {"query", "response", "history"?: [[query, response]], "system"?}, with the synonyms below
  {"instruction", "input"?, "output"}                  query = instruction, newline, input
Preference, KTO and prompt-only rows are recognised and refused by the name of their stage.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swiftk.config import DataConfig
from swiftk.trainer.docstrings import stdlib_docstrings
from swiftk.trainer.shuffle import shuffle_keys

BUILTIN: dict[str, Callable[[], Sequence[dict[str, Any]]]] = {"python-stdlib-docstrings": stdlib_docstrings}
QUERY = ("query", "prompt", "input", "instruction", "question", "problem")  # the first one present is taken
RESPONSE = ("response", "answer", "output", "targets", "text", "completion", "solution")
REJECTED = ("rejected_response", "rejected_messages", "rejected")
NESTED = ("messages", "conversation", "conversations", "history")  # in csv: JSON text
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "tool": "tool", "observation": "tool",
}  # fmt: skip
STAGES = ("pt", "sft")

Message = dict[str, Any]  # role, content and, where the file says so, loss


@dataclass(frozen=True)
class Row:
    """One conversation, or in stage pt one document as a single assistant message. source: "file line 3"."""

    messages: list[Message]
    source: str


class RowError(ValueError):
    """What is wrong with one row; `strict: false` skips and counts it."""


# --- formats -----------------------------------------------------------------------------------------------------


def to_messages(record: Mapping[str, Any], stage: str, system: str | None = None) -> list[Message]:
    """The messages of one record in any accepted format. `system` is used where the record has none of its own.

    Raises: RowError that names the keys seen, or the stage that the row belongs to.
    """
    empty = [key for key, value in record.items() if value is None]
    record = {key: value for key, value in record.items() if value is not None}
    for key in REJECTED:
        if key in record:
            raise RowError(f"{key!r} makes this a preference row: stage dpo is not there yet; drop that column for stage sft")
    if isinstance(record.get("label"), bool) and not record.keys().isdisjoint(("messages", *RESPONSE)):
        raise RowError("a true/false 'label' makes this a KTO row: stage kto is not there yet; drop that column for stage sft")
    messages = _conversation(record)
    if messages is None:
        seen = [*map(repr, record), *(f"{key!r} (null)" for key in empty)]
        raise RowError(
            f"fits no format, keys seen: {', '.join(seen) or 'none'}; wants 'messages', 'query' and 'response' "
            'or another one of docs/data.md; name the columns with --columns \'{"their name": "query"}\''
        )
    if not messages:
        raise RowError("has no messages, wants at least one")
    roles = {message["role"] for message in messages}
    if stage == "pt":
        if roles != {"assistant"}:
            raise RowError("is a conversation, stage pt wants 'text' or messages of the assistant alone; use --stage sft")
        messages = [{"role": "assistant", "content": "\n".join(message["content"] for message in messages)}]
    elif "assistant" not in roles:
        null = "".join(f"; {key!r} is null" for key in empty)
        found = f"roles {', '.join(sorted(roles))}{null}"
        raise RowError(f"has no reply ({found}): prompts belong to stage grpo, which is not there yet")
    elif "text" in record and roles == {"assistant"} and "messages" not in record:
        raise RowError("has only 'text', stage sft wants a query and a response; use --stage pt for plain text")
    elif messages[0]["role"] != "system" and (text := _text(record, "system", system)):
        messages.insert(0, {"role": "system", "content": text})
    for number, message in enumerate(messages, 1):
        content = message["content"]
        if message["role"] == "assistant" and message.get("loss", True) and not content.strip():
            raise RowError(f'message {number} (assistant) is empty, wants text to train on, or "loss": false')
        if not content.isascii() and any("\ud800" <= c <= "\udfff" for c in content):
            raise RowError(f"message {number} ({message['role']}) has half of a surrogate pair, wants valid Unicode")
    return messages


def _conversation(record: dict[str, Any]) -> list[Message] | None:
    for key in ("messages", "conversation", "conversations"):
        if key in record:
            turns = _nested(record, key)
            return [message for number, turn in enumerate(turns, 1) for message in _turn(key, number, turn)]
    if "instruction" in record and "input" in record and record.keys().isdisjoint(("query", "prompt")):
        parts = [_text(record, "instruction"), _text(record, "input")]
        query = "\n".join(part for part in parts if part)
        query_keys: tuple[str, ...] = ("instruction", "input")
    elif query_key := next((key for key in QUERY if key in record), None):
        query, query_keys = _text(record, query_key) or "", (query_key,)
    else:
        if "text" in record:
            return [{"role": "assistant", "content": _text(record, "text")}]
        return None
    messages: list[Message] = []
    for number, pair in enumerate(_nested(record, "history") if "history" in record else (), 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError(f"history {number} is {_seen(pair)}, wants [query, response]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages.append({"role": "user", "content": query})
    response = next((key for key in RESPONSE if key in record), None)
    if response is None and messages[:-1]:
        raise RowError(f"has a history and no response, keys seen: {', '.join(map(repr, record))}")
    if response is None and record.keys() - {*query_keys, "system"}:
        # other columns may hold the reply under a name that is not known: not simply a row of prompts
        raise RowError(
            f"has a query ({' + '.join(query_keys)}) and no response, keys seen: {', '.join(map(repr, record))}; name the "
            'reply with --columns \'{"its name": "response"}\' (prompts alone belong to stage grpo, which is not there yet)'
        )
    if response is not None:
        messages.append({"role": "assistant", "content": _text(record, response)})
    return messages


def _turn(key: str, number: int, turn: Any) -> list[Message]:
    """One entry of messages or conversation: {"role", "content"}, {"from", "value"} or {"human", "assistant"}."""
    where = f"{key} {number}"
    if not isinstance(turn, dict):
        raise RowError(f"{where} is {_seen(turn)}, wants an object")
    turn = {name: value for name, value in turn.items() if value is not None}
    loss = turn.pop("loss", None)
    if not isinstance(loss, bool | None):
        raise RowError(f"{where} has loss {_seen(loss)}, wants true or false")
    extra = {} if loss is None else {"loss": loss}
    if turn.keys() == {"human", "assistant"}:
        pair = ("user", turn["human"]), ("assistant", turn["assistant"])
        return [
            {"role": role, "content": _string(where, text), **(extra if role == "assistant" else {})} for role, text in pair
        ]
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if role_key in turn and content_key in turn:
            role = ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
            if role is None:
                raise RowError(f"{where} has {role_key} {_seen(turn[role_key])}, wants one of {', '.join(ROLES)}")
            if others := turn.keys() - {role_key, content_key}:
                names = ", ".join(map(repr, sorted(others)))
                raise RowError(f"{where} has {names}, which would be lost; wants {role_key}, {content_key} and loss alone")
            return [{"role": role, "content": _string(where, turn[content_key]), **extra}]
    raise RowError(f"{where} has keys {', '.join(map(repr, turn)) or 'none'}, wants 'role' and 'content'")


def _nested(record: dict[str, Any], key: str) -> list[Any]:
    value = record[key]
    if isinstance(value, str):  # csv and some parquet files
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError(f"{key} is text that is not JSON ({error.msg} at column {error.colno}): {_seen(value)}") from None
    if not isinstance(value, list):
        raise RowError(f"{key} is {_seen(value)}, wants a list")
    return value


def _text(record: dict[str, Any], key: str, default: str | None = None) -> str | None:
    return _string(key, record[key]) if key in record else default


def _string(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RowError(f"{where} is {_seen(value)}, wants text")
    return value


def _seen(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# --- files -------------------------------------------------------------------------------------------------------

Record = tuple[int, Any]  # line (parquet: row), and the object or the RowError that stands in its place


def _jsonl(path: Path, take: Callable[[int], set[int] | None]) -> Iterator[Record]:
    with path.open("rb") as file:  # binary lines end at \n alone; text lines would also end at \x85 or \u2028 inside a string
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    taken = take(len(lines))
    for index, (number, line) in enumerate(lines):
        if taken is None or index in taken:
            yield number, _json_line(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def _json_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8").rstrip("\r\n"))  # else a cut string is said to be a control character
    except UnicodeDecodeError as error:
        return RowError(f"is not UTF-8: byte {line[error.start]:#04x} at position {error.start}")
    except json.JSONDecodeError as error:
        cut = "; the file ends in the middle of this line" if not line.endswith(b"\n") else ""
        return RowError(
            f"is not JSON ({error.msg.removesuffix(' at')} at column {error.colno}): {_seen(error.doc.rstrip())}{cut}"
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"dataset: {path} is not UTF-8: byte {byte:#04x} at position {error.start}") from None


def _json(path: Path, take: Callable[[int], set[int] | None]) -> Iterator[Record]:
    text = _read_text(path)
    if not text.lstrip().startswith("["):
        yield from _jsonl(path, take)
        return
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    found: list[Record] = []
    at, line, counted = space.match(text, text.index("[") + 1).end(), 1, 0  # type: ignore[union-attr]
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
            at = space.match(text, end).end()  # type: ignore[union-attr]
            if text[at : at + 1] not in ("]", ","):
                raise json.JSONDecodeError("expected ',' or ']'", text, at)
        except json.JSONDecodeError as error:
            cut = "the file is cut off" if error.pos >= len(text.rstrip()) else f"{error.msg} at column {error.colno}"
            raise ValueError(f"dataset: {path} line {error.lineno} is not JSON ({cut}), in the entry at line {line}") from None
        found.append((line, value))
        if text[at] == ",":
            at = space.match(text, at + 1).end()  # type: ignore[union-attr]
    taken = take(len(found))
    yield from (record for index, record in enumerate(found) if taken is None or index in taken)


def _csv(path: Path, take: Callable[[int], set[int] | None]) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    found: list[Record] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError(f"dataset: {path} line 1 names a column twice: {', '.join(map(repr, header))}")
            start = reader.line_num + 1
            for cells in reader:
                if len(cells) == len(header):
                    found.append((start, {key: cell for key, cell in zip(header, cells, strict=True) if cell}))
                elif cells:
                    found.append((start, RowError(f"has {len(cells)} cells, the header has {len(header)}")))
                start = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"dataset: {path} line {reader.line_num} is not CSV ({error})") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"dataset: {path} after line {reader.line_num} is not UTF-8 ({error.reason})") from None
    taken = take(len(found))
    yield from (record for index, record in enumerate(found) if taken is None or index in taken)


def _parquet(path: Path, take: Callable[[int], set[int] | None]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        taken, index = take(file.metadata.num_rows), 0
        for batch in file.iter_batches():
            for value in batch.to_pylist():
                if taken is None or index in taken:
                    yield index + 1, value
                index += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"dataset: {path} is not a whole parquet file ({str(error).splitlines()[0]})") from None


def _txt(path: Path, take: Callable[[int], set[int] | None]) -> Iterator[Record]:
    text = _read_text(path)
    take(1)
    yield 1, {"text": text}


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}


def read_rows(config: DataConfig, dataset: tuple[str, ...] | None = None) -> tuple[list[Row], list[str]]:
    """All rows of `dataset` (None: config.dataset), and the reasons of the rows that were skipped (strict false).

    Raises: ValueError that names file, line and what was seen, for the first thing that is wrong.
    """
    dataset = config.dataset if dataset is None else dataset
    if config.stage not in STAGES:
        raise ValueError(f"stage: {config.stage!r} is not there yet, wants one of {', '.join(STAGES)}")
    if not dataset:
        raise ValueError("dataset: no file given, wants at least one path or " + ", ".join(BUILTIN))
    rows: list[Row] = []
    skipped: list[str] = []
    seen: set[str] = set()  # column names over all files, for --columns
    for name in dataset:
        unit, records = _open(name, config)
        before = len(rows) + len(skipped)
        label = Path(_path(name)).name
        for line, record in records:
            try:
                if isinstance(record, RowError):
                    raise record
                if not isinstance(record, dict):
                    raise RowError(f"is {_seen(record)}, wants an object")
                seen.update(record)
                messages = to_messages(_rename(record, config.columns), config.stage, config.system)
                rows.append(Row(messages, f"{label} {unit} {line}"))
            except RowError as error:
                if config.strict:
                    hint = "" if "--" in str(error) else "; --strict false skips such rows and counts them"
                    raise ValueError(f"dataset: {_path(name)} {unit} {line} {error}{hint}") from None
                skipped.append(f"{label} {unit} {line} {error}")
        if len(rows) + len(skipped) == before:
            raise ValueError(f"dataset: {name} has no rows, wants at least one")
    if missing := [column for column in config.columns if seen and column not in seen]:
        near = difflib.get_close_matches(missing[0], seen, 1)
        raise ValueError(
            f"columns: {missing[0]!r} is in no row, the files have {', '.join(map(repr, sorted(seen)))}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return rows, skipped


def _rename(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if not columns:
        return record
    renamed: dict[str, Any] = {}
    for key, value in record.items():
        to = columns.get(key, key)
        if to in renamed or (to != key and to in record and to not in columns):
            raise RowError(f"has two columns named {to!r} after --columns, wants one")
        renamed[to] = value
    return renamed


def _path(name: str) -> str:
    """The name without #N, unless a file is called so."""
    return name if Path(name).exists() else re.sub(r"#\d+$", "", name)


def _open(name: str, config: DataConfig) -> tuple[str, Iterator[Record]]:
    """What the numbers count (line or row), and the records of one entry of `dataset`."""
    plain = _path(name)
    wanted = int(name[len(plain) + 1 :]) if plain != name else None

    def take(available: int) -> set[int] | None:
        if wanted is None or wanted == available:
            return None
        if not 0 < wanted < available:
            raise ValueError(f"dataset: {name} wants {wanted} rows, {plain} has {available}")
        keys = shuffle_keys(available, config.seed, zlib.crc32(Path(plain).name.encode()))
        return set(np.argsort(keys, kind="stable")[:wanted].tolist())

    if plain in BUILTIN:
        built = BUILTIN[plain]()
        taken = take(len(built))
        return "row", ((index + 1, record) for index, record in enumerate(built) if taken is None or index in taken)
    path = Path(plain)
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix in READERS)
        raise ValueError(f"dataset: {plain} is a folder, wants a file" + (f" such as {', '.join(files[:5])}" if files else ""))
    if not path.exists():
        known = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, [*known, *BUILTIN], 3, 0.5)
        where = "" if path.parent.is_dir() else f" (there is no folder {path.parent} either)"
        raise ValueError(f"dataset: {plain} is not there{where}" + (f"; near it: {', '.join(near)}" if near else ""))
    if path.suffix.lower() not in READERS:
        raise ValueError(f"dataset: {plain} ends in {path.suffix!r}, wants one of {', '.join(READERS)}")
    if path.suffix.lower() == ".txt" and config.stage != "pt":
        raise ValueError(f"dataset: {plain} is plain text, stage {config.stage} wants conversations; use --stage pt")
    if path.stat().st_size == 0:
        raise ValueError(f"dataset: {plain} is empty (0 bytes)")
    return "row" if path.suffix.lower() == ".parquet" else "line", READERS[path.suffix.lower()](path, take)
