"""Reading and splitting tables."""

import bz2
import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.tables import make_rows
from vblora.errors import CommandError
from vblora.finetune import data, tables

COLUMNS = data.Columns("text", "label")


def write(path: Path, text: str) -> Path:
    content = text.encode("utf-8")
    compress = {".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".bz2"])
@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".csv", '\ufefftext,other,label\r\n"one, ""two""\nthree",0,x\r\n\r\n\'four\',0,y\r\n'),
        (".CSV", 'text,label\n"one, ""two""\nthree",x\n\'four\',y'),
    ],
)
def test_csv(tmp_path, suffix, packed, text):
    rows = data.read_rows(write(tmp_path / f"rows{suffix}{packed}", text), COLUMNS, "--data")
    assert [(row.text, row.label) for row in rows] == [('one, "two"\nthree', "x"), ("'four'", "y")]


def test_columns_that_are_not_read_may_share_a_name(tmp_path):
    path = write(tmp_path / "rows.csv", "v1,v2,,,\nham,hello,,,\nspam,win,now,,\n")
    rows = data.read_rows(path, data.Columns("v2", "v1"), "--data")
    assert [(row.text, row.label) for row in rows] == [("hello", "ham"), ("win", "spam")]
    path.write_text("a,b,a,a,a.1\n1,2,3,4,5\n")  # and are there in the output of predict
    assert tables.first_row(path, "--data") == {"a": "1", "b": "2", "a.2": "3", "a.3": "4", "a.1": "5"}


def test_errors_name_the_line_on_which_a_row_begins(tmp_path):
    path = write(tmp_path / "rows.csv", 'text,label\n"one\ntwo",x\n\n"three\nfour",\n')
    with pytest.raises(CommandError, match="line 5: column 'label' is empty"):
        data.read_rows(path, COLUMNS, "--data")


def test_quotes_of_a_tsv_are_characters(tmp_path):
    path = write(tmp_path / "rows.tsv", 'label\ttext\nx\t"one" and\ny\t"two\n')
    assert [row.text for row in data.read_rows(path, COLUMNS, "--data")] == ['"one" and', '"two']


def test_jsonl_takes_numbers_and_booleans_as_labels(tmp_path):
    lines = [{"text": "é\u2028", "label": 10}, {"text": "b", "label": True, "more": None}, {"text": "c", "label": "z"}]
    path = write(tmp_path / "rows.jsonl", "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    rows = data.read_rows(path, COLUMNS, "--data")
    assert [(row.text, row.label) for row in rows] == [("é", "10"), ("b", "True"), ("c", "z")]
    (tmp_path / "list.jsonl").write_text('{"text": "a", "label": 0.5}\n{"text": "a", "label": [1]}')
    with pytest.raises(CommandError, match=r"line 2: column 'label' is \[1\]; it must be a string or a number"):
        data.read_rows(tmp_path / "list.jsonl", COLUMNS, "--data")


def test_a_long_text_is_read(tmp_path):
    path = write(tmp_path / "rows.csv", f"text,label\n{'word ' * 100_000},x\n")
    assert len(data.read_rows(path, COLUMNS, "--data")[0].text) == 499_999


def test_rows_of_other_labels_are_left_out_unread(tmp_path):
    path = write(tmp_path / "rows.csv", "text,label\na,x\n,plot\nb,y\n")
    assert [row.text for row in data.read_rows(path, COLUMNS, "--data", ["x", "y"])] == ["a", "b"]


def test_a_damaged_archive_is_refused(tmp_path):
    path = write(tmp_path / "rows.csv.gz", "text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(5000)))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:500] + b"\0\0\0\0" + whole[504:]):
        path.write_bytes(damaged)
        with pytest.raises(CommandError, match=r"--data: .*cannot be read|line \d+"):
            data.read_rows(path, COLUMNS, "--data")


def test_labels_are_in_order():
    def labels(*values: str) -> list[str]:
        return data.labels_of([data.Row("", v, None, None) for v in values * 3], Path("rows.csv"), "label")

    assert labels("b", "a") == ["a", "b"]
    assert labels("10", "9", "0") == ["0", "9", "10"]
    assert labels("9" * 5000, "1") == ["1", "9" * 5000]


def test_labels_that_are_equal_as_numbers_have_one_order_in_every_process():
    """In each, texts have other hashes, and so sets another order."""
    labels = ["001", "01", "1", "02", "2"]

    class Label(str):
        __slots__ = ("hash",)

        def __hash__(self) -> int:
            return self.hash

    orders = set()
    for hashes in itertools.permutations(range(5)):
        given = [Label(label) for label in labels]
        for label, hash_ in zip(given, hashes, strict=True):
            label.hash = hash_
        orders.add(tuple(set(given)))
        rows = [data.Row("", label, None, None) for label in given * 3]
        assert data.labels_of(rows, Path("rows.csv"), "label") == labels
    assert len(orders) > 1


def rows_of(count: int) -> list[data.Row]:
    return [data.Row(row["text"], row["label"], None, row["film"]) for row in make_rows(count)]


def test_a_split_keeps_groups_and_texts_apart():
    rows = rows_of(200)
    rows += [row._replace(group="film 3") for row in rows[:20]]
    train, held_out = data.split_rows(rows, 0.2, seed=1)
    assert not {row.group for row in train} & {row.group for row in held_out}
    assert not {row.text for row in train} & {row.text for row in held_out}
    assert 0.1 * len(rows) < len(held_out) < 0.35 * len(rows)
    assert data.split_rows(rows, 0.2, seed=1) == (train, held_out)
    assert data.split_rows(rows, 0.2, seed=2) != (train, held_out)


def test_a_split_without_groups_keeps_texts_apart():
    rows = [row._replace(group=None) for row in rows_of(100) * 2]
    train, held_out = data.split_rows(rows, 0.25, seed=0)
    assert Counter(train + held_out) == Counter(rows)
    assert not {row.text for row in train} & {row.text for row in held_out}
    assert 45 <= len(held_out) <= 55


def test_a_split_that_leaves_nothing_is_refused():
    rows = [row._replace(group="the only one") for row in rows_of(10)]
    with pytest.raises(CommandError, match=r"--eval-fraction: 0.2 of 10 rows in 1 groups leaves 0 to train on"):
        data.split_rows(rows, 0.2, seed=0)


def test_columns_are_found_in_any_case_if_that_is_unambiguous(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("Text,LABEL \na,x\nb,y\n")
    rows = data.read_rows(path, data.Columns("text", "label"), "--data")
    assert [(row.text, row.label) for row in rows] == [("a", "x"), ("b", "y")]
    path.write_text("Text,TEXT,label\na,b,x\n")
    with pytest.raises(CommandError, match=r"--text-column: .* has no column 'text'"):
        data.read_rows(path, data.Columns("text", "label"), "--data")
    assert data.read_rows(path, data.Columns("TEXT", "label"), "--data")[0].text == "b"


def test_labels_that_look_alike_or_are_rare_are_said(tmp_path, capsys):
    labels = ["1", "1.0", "neg", "NEG", "b", "caf\u00e9", "cafe\u0301", "nan"]
    rows = [data.Row("", label, None, None) for label in labels * 2 + ["rare"]]
    data.warn_of_odd_labels(rows, tmp_path, "finetune")
    told = capsys.readouterr().err
    assert "the labels '1', '1.0' look alike" in told and "the labels 'NEG', 'neg' look alike" in told
    assert "the labels 'cafe\u0301', 'caf\u00e9' look alike" in told
    assert "the label 'nan' is a class, though it looks like a missing value" in told
    assert "only one row has the label 'rare'" in told and told.count("\n") == 5
    data.warn_of_odd_labels(rows[4:6] * 2, tmp_path, "finetune")
    assert not capsys.readouterr().err
