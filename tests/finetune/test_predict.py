"""Scores, and `vblora predict`: a table in, labels or scores out."""

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import vblora
from tests.tables import make_rows, write_csv
from vblora.cli import main
from vblora.errors import CommandError
from vblora.finetune import adapters, data
from vblora.finetune.outputs import Writer
from vblora.finetune.scores import pearson, spearman

pytestmark = pytest.mark.usefixtures("one_thread")


def make_scores(count: int, seed: int = 0) -> list[dict[str, str]]:
    """A score of about 1000 for each text: so many good words, and a fraction."""
    rows = make_rows(count, seed)
    return [row | {"label": str(1000.5 + 10 * (row["label"] == "fresh"))} for row in rows]


def results_of(folder: Path) -> dict:
    return json.loads((folder / "finetune.json").read_text())


def test_correlations():
    generator = np.random.default_rng(0)
    one = generator.integers(0, 6, 50).astype(float)
    other = one + generator.normal(size=50)
    assert pearson(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1])
    scipy = pytest.importorskip("scipy.stats")
    assert spearman(one, other) == pytest.approx(scipy.spearmanr(one, other).statistic)
    assert pearson(one, np.ones(50)) == 0


def test_numbers_with_fractions_are_scores():
    def rows(*labels):
        return [data.Row("", label, None, None) for label in labels]

    assert data.are_scores(rows("1", "2.5", "-3e2"))
    assert not data.are_scores(rows("1", "2", "3.0"))
    assert not data.are_scores(rows("1.5", "good"))


@pytest.mark.usefixtures("rendered")
def test_scores_are_learnt_and_predicted_in_their_own_units(finetune, tiny_model, tmp_path, capsys):
    table = write_csv(tmp_path / "scores.csv", make_scores(240))
    options = ["--epochs", "8", "--batch-size", "4", "--lr-bank", "0.02", "--precision", "float32"]
    scored = tmp_path / "scored"
    assert finetune("--data", table, "--text-column", "text", *options, output=scored) == 0
    assert "scores from 1000.5 to 1010.5" in (printed := capsys.readouterr().out)
    report = results_of(scored)
    results = report["results"]
    assert report["task"] == "regression" and results["metric"] == "pearson"
    assert results["adapted"] > 0.5
    assert f"{results['adapted']:.4f}" in printed and f"{results['metrics']['spearman']:.4f}" in printed
    best = max(entry["eval_pearson"] for entry in report["log"] if "eval_pearson" in entry)
    assert results["adapted"] == pytest.approx(best)

    rows = make_scores(40, seed=1)
    table = write_csv(tmp_path / "rows.csv", rows)
    options = ["--data", table, "--adapter", scored, "--output", tmp_path / "out.jsonl", "--precision", "float32"]
    assert main(["predict", *map(str, options)]) == 0
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in written] == [row["text"] for row in rows]
    predicted = np.array([row["predicted"] for row in written])
    assert 1000 < predicted.mean() < 1011
    assert pearson(predicted, np.array([float(row["label"]) for row in rows])) > 0.4
    assert predicted == pytest.approx(by_hand(tiny_model, scored, rows, report["scores"]), abs=1e-3)


def test_a_loss_of_scores_is_the_mean_over_all_rows_of_a_step(finetune, tmp_path):
    table = write_csv(tmp_path / "scores.csv", make_scores(40))
    few = ["--max-train", "16", "--max-eval", "4", "--batch-size", "2", "--accumulate", "8", "--no-baseline"]
    assert finetune("--data", table, "--text-column", "text", *few) == 0
    [loss] = [entry["loss"] for entry in results_of(tmp_path / "out")["log"] if "loss" in entry]
    assert 0.5 < loss < 2  # of scores whose deviation is 1; the sum of the batches' means would be 8 times that


def by_hand(base: Path, adapter: Path, rows: list[dict[str, str]], scale: dict[str, float]) -> list[float]:
    outputs = logits(base, adapter, rows, 1)[:, 0]
    return (outputs * scale["deviation"] + scale["mean"]).tolist()


def logits(base: Path, adapter: Path, rows: list[dict[str, str]], outputs: int) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs).eval()
    vblora.load(model, adapter)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])


def test_labels_of_several_adapters(finetune, tiny_model, tmp_path):
    table = write_csv(tmp_path / "rows.csv", make_rows(60))
    other = write_csv(tmp_path / "other.csv", [row | {"label": f"the {row['label']}"} for row in make_rows(60)])
    for path, seed in ((table, "0"), (other, "1")):
        out = tmp_path / "adapters" / path.stem
        assert finetune("--data", path, "--no-baseline", "--seed", seed, output=out) == 0
    rows = [row | {"which": ("rows", "other")[i % 2]} for i, row in enumerate(make_rows(9, seed=2))]
    asked = write_csv(tmp_path / "asked.csv", rows)
    options = ["--data", asked, "--adapter", tmp_path / "adapters", "--adapter-column", "which", "--batch-size", "2"]
    out = tmp_path / "out.csv"
    assert main(["predict", *map(str, options), "--output", str(out), "--precision", "float32"]) == 0
    written = list(csv.DictReader(out.open(newline="")))
    for name, labels in {"rows": ["fresh", "rotten"], "other": ["the fresh", "the rotten"]}.items():
        mine = [row for row in written if row["which"] == name]
        shares = logits(tiny_model, tmp_path / "adapters" / name, mine, 2).softmax(-1)
        assert [row["predicted"] for row in mine] == [labels[i] for i in shares.argmax(-1).tolist()]
        assert [float(row["probability"]) for row in mine] == pytest.approx(shares.amax(-1).tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--adapter: missing. Give the folder of the adapter"),
        (["--adapter", "ADAPTER"], "--labels: .* does not contain the adapter's labels"),
        (["--adapter", "ADAPTER", "--labels", "a,b", "--text-column", "x"], "--text-column: .* has no column 'x'"),
        (["--adapter", "ADAPTER", "--labels", "a,b", "--bank", "nowhere"], "--bank: nowhere is missing"),
        (["--adapter", "ADAPTER", "--output", "rows.csv.gz"], "would be compressed"),
        (["--adapter", "ADAPTER", "--labels", "a"], "--labels: is 'a', but a classifier has at least two labels"),
        (["--adapter", "ADAPTER", "--labels", "a,b,a"], "--labels: is 'a', 'b', 'a', but .* all different"),
    ],
)
def test_a_bad_argument_is_refused(tiny_model, tmp_path, capsys, options, expected):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_model)}))
    table = write_csv(tmp_path / "rows.csv", make_rows(4))
    options = [adapter if option == "ADAPTER" else option for option in options]
    assert main(["predict", "--data", str(table), *map(str, options)]) == 2
    error = capsys.readouterr().err
    assert re.search(expected, error) and error.count("\n") == 1, error


def adapter_of(folder: Path, base: Path, report: object = None) -> Path:
    """What ``vblora predict`` reads of an adapter before its tensors."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    if report is not None:
        (folder / "finetune.json").write_text(report if isinstance(report, str) else json.dumps(report))
    return folder


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"labels": "fresh"}, "`labels` is 'fresh', but must be an array"),
        ({"labels": ["fresh", 1]}, "item 1 of `labels` is 1, but must be a string"),
        ({"scores": {"mean": "high", "deviation": 1}}, "`mean` of `scores` is 'high', but must be a finite number"),
        ({"scores": {"mean": 1, "deviation": math.nan}}, "`deviation` of `scores` is nan, but must be a finite number"),
        ({"arguments": ["--text-column"]}, r"`arguments` is \['--text-column'\], but must be an object"),
        ({"arguments": {"max_length": "64"}}, "`max_length` is '64', but must be an integer"),
        ({"model": 5}, "`model` is 5, but must be a string"),
        ('{"labels": ["a", "b"], "labels": ["b", "a"]}', "the field 'labels' is there twice"),
        ("[" * 100_000, "the JSON is nested too deeply"),
    ],
)
def test_a_damaged_report_is_refused(tiny_model, tmp_path, capsys, report, expected):
    adapter = adapter_of(tmp_path / "adapter", tiny_model, report)
    table = write_csv(tmp_path / "rows.csv", make_rows(4))
    assert main(["predict", "--data", str(table), "--adapter", str(adapter)]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"--adapter: .*finetune.json .*{expected}", error) and error.count("\n") == 1, error


def test_all_rows_are_checked_before_the_model_is_loaded(tiny_model, tmp_path, capsys, monkeypatch):
    for name, value in {"_CHUNK": 1, "_Predictor": None}.items():
        monkeypatch.setattr(f"vblora.finetune.predicting.{name}", value)
    adapter = adapter_of(tmp_path / "adapter", tiny_model, {"labels": ["a", "b"]})
    rows = make_rows(3)
    rows[2]["text"] = " "
    table = write_csv(tmp_path / "rows.csv", rows)
    assert main(["predict", "--data", str(table), "--adapter", str(adapter)]) == 2
    assert "line 4: column 'text' is empty" in capsys.readouterr().err
    assert main(["predict", "--data", str(table), "--adapter", str(adapter), "--labels", "b,a"]) == 2
    assert "was trained with the order 'a', 'b'. Leave it out." in capsys.readouterr().err


def test_adapters_that_were_trained_on_other_columns_are_not_mixed(tiny_model, tmp_path, capsys):
    for name, columns in {"one": {}, "two": {"pair_column": "title"}}.items():
        adapter_of(tmp_path / "adapters" / name, tiny_model, {"labels": ["a", "b"], "arguments": columns})
    table = write_csv(tmp_path / "rows.csv", make_rows(4))
    command = ["predict", "--data", table, "--adapter", tmp_path / "adapters", "--adapter-column", "film"]
    assert main([*map(str, command)]) == 2
    assert re.search("--pair-column: .*one was trained with None, .*two with title. Give", capsys.readouterr().err)


def test_an_adapters_link_is_called_by_its_own_name(tmp_path):
    adapter = adapter_of(tmp_path / "v12", tmp_path)
    (tmp_path / "prod").symlink_to(adapter)
    assert adapters.find_folders([tmp_path / "prod"]) == {"prod": tmp_path / "prod"}


@pytest.mark.parametrize("name", ["out.csv", "out.tsv"])
def test_rows_with_other_columns_are_refused_in_a_table(tmp_path, name):
    def write():
        with Writer(tmp_path / name) as writer:
            writer.row({"a": 1})
            writer.row({"a": 1, "b": 2})

    with pytest.raises(CommandError, match=r"--output: some rows have the column 'b' and others .* a .jsonl file"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_tsv_has_no_tabs_within_names_and_values(tmp_path):
    with Writer(tmp_path / "out.tsv") as writer:
        writer.row({"a\tb": "c\nd", "e": 1})
    assert (tmp_path / "out.tsv").read_text() == "a b\te\nc d\t1\n"


def test_half_a_surrogate_pair_is_written_as_json_has_it(tmp_path):
    with Writer(tmp_path / "out.jsonl") as writer:
        writer.row({"note": "\ud800"})
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"note": "\ud800"}


@pytest.mark.parametrize(("encoding", "written"), [("ascii", "\\u00e9"), ("utf-8", "é")])
def test_the_console_gets_json_whatever_its_encoding(monkeypatch, encoding, written):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", stdout)
    with Writer(None) as writer:
        writer.row({"note": "é"})
    stdout.seek(0)
    assert stdout.read() == f'{{"note": "{written}"}}\n'


def test_a_label_that_is_no_score_is_refused(finetune, tmp_path, capsys):
    rows = make_scores(20)
    rows[3]["label"] = "nan"
    table = write_csv(tmp_path / "rows.csv", rows)
    assert finetune("--data", table, "--task", "regression") == 2
    assert "have the label 'nan', but for --task regression it must be a finite number" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
