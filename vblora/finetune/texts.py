"""Texts to fine-tune a language model on: plain text, prompts with completions, and chats.

Files are read as they are needed, and only a number a row is kept, so they may be larger than memory.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import CommandError
from . import tables

_KINDS = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}  # in the order of preference
_ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, Any]


class Columns(NamedTuple):
    """What a file's rows are, and the names of the columns to read.

    Attributes:
        kind: "text", "prompt" (with a completion), or "messages".
        names: the column of each part, by the part's name.
    """

    kind: str
    names: dict[str, str]

    def by_option(self) -> dict[str, str]:
        return {f"--{part}-column": name for part, name in self.names.items()}


class Example(NamedTuple):
    """A prompt, and the completion to learn: both plain text or both messages. Plain text without a prompt is all learnt."""

    prompt: str | list[Message] | None
    completion: str | list[Message]
    tools: list[Any] | None = None  # of a chat: what its template may list


@dataclass
class Texts:
    """Rows of a file that are trained on, or evaluated on.

    Attributes:
        rows: the numbers of these rows, counted from 0, in ascending order.
    """

    path: Path
    columns: Columns
    option: str
    rows: "np.ndarray[Any, np.dtype[np.int64]]"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        wanted = iter(self.rows)
        row = next(wanted, None)
        for number, example in enumerate(read_examples(self.path, self.columns, self.option)):
            if row is None:
                return
            if number == row:
                yield example
                row = next(wanted, None)


def find_columns(path: Path, option: str, given: dict[str, str | None]) -> Columns:
    """The columns to read: those that are given, or else those that the file's first row has.

    Args:
        given: the column of each part ("text", "prompt", "completion", "messages"), or None if its option was not given.

    Raises:
        CommandError: the file has no such columns, or the options contradict each other or name one column twice.
    """
    header = tables.first_row(path, option)
    given = {part: name and tables.find_column(name, header) for part, name in given.items()}
    named = {part for part, name in given.items() if name is not None}
    for kind, parts in _KINDS.items():
        if named and not named <= set(parts):
            continue
        names = {part: given[part] or tables.find_column(part, header) for part in parts}
        if named or all(name in header for name in names.values()):
            tables.refuse_one_twice(names)
            return Columns(kind, names)
    if named:
        options = " and ".join(f"--{part}-column" for part in sorted(named))
        raise CommandError(
            f"{options} do not go together. Give --text-column, or --prompt-column and --completion-column, "
            "or --messages-column."
        )
    raise CommandError(
        f"{option}: {path} has the columns {tables.quoted(header)}. A language model trains on `text`, on `prompt` and "
        "`completion`, or on `messages`. If yours have other names, give --text-column, --prompt-column and "
        "--completion-column, or --messages-column."
    )


def read_examples(path: Path, columns: Columns, option: str) -> Iterator[Example]:
    """All examples of a file, checked.

    Raises:
        CommandError: a row is not what ``columns`` says. The message names its line.
    """
    names = columns.names
    for where, fields in tables.read(path, option, columns.by_option()):
        if columns.kind == "text":
            yield Example(None, _text(fields, names["text"], where))
        elif columns.kind == "messages":
            messages = _messages(fields, names["messages"], where)
            first = _first_of_assistant(messages)
            if first is None:
                raise CommandError(
                    f"{where}: column {names['messages']!r} has no message of the assistant, so there is nothing to learn."
                )
            yield Example(messages[:first], messages[first:], _tools(fields, where))
        elif isinstance(fields[names["prompt"]], list) or isinstance(fields[names["completion"]], list):
            _refuse_one_text(fields, names, where)
            prompt, completion = (_messages(fields, names[part], where) for part in ("prompt", "completion"))
            if all(message["role"] != "assistant" for message in completion):
                raise CommandError(
                    f"{where}: column {names['completion']!r} has no message of the assistant, so there is nothing to learn."
                )
            yield Example(prompt, completion, _tools(fields, where))
        else:
            yield Example(_text(fields, names["prompt"], where), _text(fields, names["completion"], where))


class Prompt(NamedTuple):
    """What to complete.

    Attributes:
        asked: a text, or the messages of a chat.
        tools: of a chat: what its template may list.
        shortened: whether the row's chat went on with what the assistant says, as rows to train on do.
    """

    asked: str | list[Message]
    tools: list[Any] | None = None
    shortened: bool = False


def read_prompt(fields: tables.Fields, column: str | None, where: str) -> Prompt:
    """The prompt of a row. Of a chat that ends with the assistant, it is what a row to train on has as its prompt.

    Args:
        column: the prompt's; None is the first of "prompt", "messages" and "text" that there is.

    Raises:
        CommandError: the row has no such column, or it is not a prompt.
    """
    name = column or next(
        (name for name in ("prompt", "messages", "text") if tables.find_column(name, fields) in fields), None
    )
    name = name and tables.find_column(name, fields)
    if name is None or name not in fields:
        wanted = "`prompt`, `messages` or `text`" if name is None else repr(name)
        raise CommandError(
            f"{where}: there is no column {wanted}, only {tables.quoted(fields)}. Give the prompt's as --prompt-column."
        )
    if name.lower() != "messages" and not isinstance(fields[name], list):
        return Prompt(_text(fields, name, where))
    messages = _messages(fields, name, where)
    shortened = messages[-1]["role"] == "assistant"
    if shortened:
        messages = messages[: _first_of_assistant(messages)]
    if not messages:
        raise CommandError(f"{where}: column {name!r} begins with a message of the assistant, so there is no prompt.")
    return Prompt(messages, _tools(fields, where), shortened)


def _first_of_assistant(messages: list[Message]) -> int | None:
    """Where the prompt of a chat ends: the place of the assistant's first message, if there is one."""
    return next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)


def split(
    path: Path, columns: Columns, *, fraction: float | None, max_train: int | None, max_eval: int | None, seed: int
) -> tuple[Texts, Texts]:
    """Rows to train on and rows to evaluate on. Rows with the same prompt are on the same side; plain texts count as prompts.

    Args:
        fraction: the share of the rows to evaluate on; None is a tenth, and at most ``max_eval``.

    Raises:
        CommandError: a row is wrong, or one side would be empty.
    """
    keys = np.fromiter((_key(example, seed) for example in read_examples(path, columns, "--data")), np.uint64)
    wanted = 0.1 if fraction is None else fraction
    if fraction is None and max_eval is not None:
        wanted = min(wanted, max_eval / max(len(keys), 1))
    order = np.sort(keys)
    last = order[min(max(round(wanted * len(keys)), 1), len(keys)) - 1]  # rows up to this key are held out
    if last == order[-1]:
        raise CommandError(
            f"--eval-fraction: {wanted:.3g} of {len(keys)} rows with {len(np.unique(keys))} different prompts leaves nothing to "
            "train on. Add rows, or give --eval-data."
        )
    held_out = keys <= last
    generator = np.random.default_rng(seed)
    train, evaluate = (
        _sample(np.flatnonzero(side), count, generator)
        for side, count in ((~held_out, max_train), (held_out, max_eval))
    )
    return Texts(path, columns, "--data", train), Texts(path, columns, "--data", evaluate)


def whole(path: Path, columns: Columns, option: str, count: int | None, seed: int) -> Texts:
    """All rows of a file, or ``count`` of them drawn at random. All of them are checked."""
    rows = sum(1 for _ in read_examples(path, columns, option))
    return Texts(path, columns, option, _sample(np.arange(rows), count, np.random.default_rng(seed)))


def count_common(train: Texts, held_out: Texts) -> int:
    """How many of the rows to evaluate on are also trained on."""
    of_train, of_held_out = (
        np.fromiter((_hash(example[:2]) for example in rows), np.uint64) for rows in (train, held_out)
    )
    return int(np.isin(of_held_out, of_train).sum())


def _sample(rows: "np.ndarray[Any, Any]", count: int | None, generator: np.random.Generator) -> "np.ndarray[Any, Any]":
    if count is None or count >= len(rows):
        return rows
    return np.sort(generator.choice(rows, count, replace=False))


def _key(example: Example, seed: int) -> int:
    """A number that rows with the same prompt share, different for each seed."""
    return _hash(example.completion if example.prompt is None else example.prompt, seed)


def _hash(value: object, seed: int = 0) -> int:
    text = json.dumps(value, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest(), "little")


def _text(fields: tables.Fields, column: str, where: str) -> str:
    """A field that is plain text. A chat that became text, as in a .csv file, would be learnt with all its brackets."""
    text = tables.value(fields, column, where)
    if re.match(r"""\s*\[\s*\{\s*["'](role|content)["']""", text):
        raise CommandError(
            f"{where}: column {column!r} is a list of messages that was written as text, {text!r:.60}. Give whole chats as JSON "
            "in a column `messages`, or lists of messages in a .jsonl file."
        )
    return text


def _messages(fields: tables.Fields, column: str, where: str) -> list[Message]:
    """A chat: a list of messages, or its JSON, as a CSV file has it."""
    found = fields[column]
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise CommandError(f"{where}: column {column!r} is not valid JSON: {error}.") from None
    wanted = 'must be a list of messages, such as [{"role": "user", "content": "Hello"}]'
    if not isinstance(found, list) or not found:
        raise CommandError(f"{where}: column {column!r} is {json.dumps(found):.100}; it {wanted}.")
    for message in found:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _ROLES:
            raise CommandError(
                f"{where}: column {column!r} has {json.dumps(message):.100}; it {wanted}, whose roles are {', '.join(_ROLES)}."
            )
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise CommandError(f"{where}: the content of a message is {json.dumps(content):.100}; it must be text.")
        if role == "assistant" and not (content and content.strip()) and not message.get("tool_calls"):
            raise CommandError(f"{where}: a message of the assistant is empty. Fill it in, or remove the line.")
        tables.check_characters(json.dumps(message, ensure_ascii=False), f"{where}: column {column!r}")
    return found


def _refuse_one_text(fields: tables.Fields, names: dict[str, str], where: str) -> None:
    """Refuses a prompt of messages with a completion that is a text, or the other way round."""
    for part, other in (("prompt", "completion"), ("completion", "prompt")):
        found = fields[names[part]]
        if isinstance(found, str) and not found.lstrip().startswith("["):  # not JSON of messages either
            raise CommandError(
                f"{where}: column {names[part]!r} is a text, but column {names[other]!r} is a list of messages. Both must be "
                "lists of messages, or both texts."
            )


def _tools(fields: tables.Fields, where: str) -> list[Any] | None:
    tools = fields.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise CommandError(f"{where}: column 'tools' is not valid JSON: {error}.") from None
    if tools is not None and not isinstance(tools, list):
        raise CommandError(f"{where}: column 'tools' is {json.dumps(tools):.100}; it must be a list.")
    return tools or None
