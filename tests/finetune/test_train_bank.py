"""`vblora train-bank` from its arguments to what it leaves behind."""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vblora
from tests.finetune.chats import make_pairs, save_model, write_jsonl
from tests.finetune.test_language import held_out_loss
from tests.tables import make_rows, write_csv
from vblora.cli import main
from vblora.cli import train_bank as command
from vblora.finetune.task import Task


@pytest.fixture
def train_bank(tiny_model: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs ``vblora train-bank`` on the tiny model into ``tmp_path/"out"``: the exit code."""

    def run(*arguments: str | Path) -> int:
        sizes = ["--num-vectors", "16", "--vector-length", "16", "--r", "2", "--precision", "float32"]
        return main(
            ["train-bank", "--model", str(tiny_model), "--output", str(tmp_path / "out"), *sizes, *map(str, arguments)]
        )

    return run


def read_tasks(*arguments: str | Path):
    """The tasks that ``vblora train-bank`` reads, and its arguments."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    read = parser.parse_args(["train-bank", "--output", "x", "--r", "2", *map(str, arguments)])
    command.settle_options(read, read.task, command._OPTIONS)
    return read, command._read_tasks(read)


def best_classes(tiny_model: Path, adapter: Path, texts: list[str]) -> list[int]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model).eval()
    vblora.load(model, adapter, bank=adapter.parent / "bank.safetensors")
    with torch.no_grad():
        return [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]


def accuracy_of(tiny_model: Path, adapter: Path, task: Task) -> float:
    best = best_classes(tiny_model, adapter, [row.text for row in task.held_out])
    right = [task.labels[one] == row.label for one, row in zip(best, task.held_out, strict=True)]
    return sum(right) / len(right)


@pytest.fixture
def tables(tmp_path: Path) -> list[str]:
    films = write_csv(tmp_path / "films.csv", make_rows(120))
    opposite = {"fresh": "old", "rotten": "new"}
    ages = [{"words": row["text"], "age": opposite[row["label"]]} for row in make_rows(60, seed=1)]
    return ["--data", f"films={films}", "--data", f"ages={write_csv(tmp_path / 'ages.csv', ages)}",
            "--text-column", "ages=words", "--label-column", "ages=age"]  # fmt: skip


def test_trains_one_bank_and_an_adapter_for_each_table(train_bank, tables, tiny_model, tmp_path, capsys):
    assert train_bank(*tables, "--epochs", "4", "--batch-size", "8", "--train-scales") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["ages", "bank.safetensors", "films", "train-bank.json"]
    report = json.loads((out / "train-bank.json").read_text())
    assert report["labels"] == {"films": ["fresh", "rotten"], "ages": ["new", "old"]}
    assert report["bank_bytes"] == (out / "bank.safetensors").stat().st_size
    printed = capsys.readouterr().out
    assert "{'loss'" not in printed  # a progress bar on stderr instead
    _, tasks = read_tasks(*tables, "--model", tiny_model)
    for name, rows in (("films", 120), ("ages", 60)):
        result = report["results"][name]
        # A text that is on both sides is not held out.
        assert rows - 20 < result["train_rows"] + result["held_out_rows"] <= rows
        assert result["accuracy"] == pytest.approx(accuracy_of(tiny_model, out / name, tasks[name]))
        assert name in printed
        stored = load_file(out / name / "adapter_model.safetensors")
        assert not [tensor for tensor in stored if tensor.startswith("bank")]
        assert stored["scales"].lt(0).any()
        sizes = [(out / name / file).stat().st_size for file in ("adapter_model.safetensors", "adapter_config.json")]
        assert sum(sizes) == result["adapter_bytes"]

    write_csv(tmp_path / "new.csv", rows := [{"words": row["text"]} for row in make_rows(8, seed=2)])
    for name, labels in report["labels"].items():  # the folder knows its labels, its base model and its column
        options = ["--adapter", out / name, "--bank", out / "bank.safetensors", "--data", tmp_path / "new.csv"]
        options += ["--text-column", "words"] * (name == "films") + ["--output", tmp_path / f"{name}.jsonl"]
        assert main(["predict", *map(str, options), "--precision", "float32"]) == 0
        written = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [row["predicted"] for row in written] == [
            labels[best] for best in best_classes(tiny_model, out / name, [row["words"] for row in rows])
        ]

    command = ["finetune", "--model", tiny_model, "--data", tmp_path / "films.csv", "--bank", out / "bank.safetensors"]
    command += ["--r", "2", "--epochs", "1", "--output", tmp_path / "another"]
    before = hashlib.sha256((out / "bank.safetensors").read_bytes()).digest()
    assert main([*map(str, command)]) == 0  # takes the bank's size from its file
    stored = load_file(tmp_path / "another" / "adapter_model.safetensors")
    assert not [tensor for tensor in stored if tensor.startswith("bank")]
    results = json.loads((tmp_path / "another" / "finetune.json").read_text())["results"]
    # 120 sub-vectors with two weights and two indices of a byte, and the head; not the bank.
    assert results["stored"] == 120 * 2 * 5 // 4 + 2 * (32 + 1)
    assert hashlib.sha256((out / "bank.safetensors").read_bytes()).digest() == before


def test_language_models_share_a_bank(tmp_path, capsys):
    pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM

    base, out = save_model(tmp_path / "llama"), tmp_path / "out"
    pairs = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(40))
    asked = [{"ask": row["prompt"], "answer": "hello ."} for row in make_pairs(30, seed=1)]
    files = ["--data", f"pairs={pairs}", "--data", f"hello={write_jsonl(tmp_path / 'hello.jsonl', asked)}",
             "--prompt-column", "hello=ask", "--completion-column", "hello=answer"]  # fmt: skip
    sizes = ["--num-vectors", "16", "--vector-length", "16", "--r", "2", "--precision", "float32", "--epochs", "4"]
    fixed = ["train-bank", "--task", "causal-lm", "--model", base, "--output", out, "--eval-fraction", "0.3"]
    assert main([*map(str, [*fixed, *files, *sizes]), "--batch-size", "3"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["bank.safetensors", "hello", "pairs", "train-bank.json"]
    results = json.loads((out / "train-bank.json").read_text())["results"]
    assert results.keys() == {"pairs", "hello"}
    for name, rows in (("pairs", make_pairs(40)), ("hello", make_pairs(30, seed=1))):
        result = results[name]
        assert result["train_rows"] + result["held_out_rows"] == len(rows)
        assert result["loss_after"] < 0.8 * result["loss_before"]
        stored = load_file(out / name / "adapter_model.safetensors")
        assert stored and not [tensor for tensor in stored if tensor.startswith("bank")]

    _, tasks = read_tasks("--task", "causal-lm", "--model", base, "--eval-fraction", "0.3", *files)
    model = vblora.load(AutoModelForCausalLM.from_pretrained(base), out / "hello", bank=out / "bank.safetensors").eval()
    held_out = [{"prompt": row.prompt, "completion": row.completion} for row in tasks["hello"].held_out]
    assert held_out_loss(model, base, held_out) == pytest.approx(results["hello"]["loss_after"], rel=1e-5)
    capsys.readouterr()
    bank = ["--bank", str(out / "bank.safetensors")]
    generate = ["generate", "--adapter", str(out / "hello"), "--precision", "float32", "--max-new-tokens", "3"]
    assert main([*generate, *bank, "--prompt", asked[0]["ask"]]) == 0
    assert "hello ." in capsys.readouterr().out

    fixed[fixed.index("--output") + 1] = tmp_path / "none"
    for options, message in (
        (["--lr-head", "1"], "--lr-head is for --task classification, but the task is causal-lm"),
        (["--label-column", "x"], "--label-column is for --task classification"),
        (
            ["--text-column", "hello=ask"],
            "--completion-column and --prompt-column and --text-column do not go together",
        ),
    ):
        assert main([*map(str, [*fixed, *files, *sizes, *options])]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "none").exists()
    fixed[2] = "classification"
    assert main([*map(str, [*fixed, "--data", f"a={pairs}", "--data", f"b={pairs}"])]) == 2
    assert "Give --task causal-lm" in capsys.readouterr().err


def test_models_share_the_encoders_memory(tables, tiny_model):
    from vblora.finetune import models, shared_classifiers

    arguments, tasks = read_tasks(*tables, "--model", tiny_model)
    one, two = shared_classifiers._models(arguments, tasks, models.load_tokenizer(str(tiny_model))).values()
    frozen = {name: p.data_ptr() for name, p in one.named_parameters() if not p.requires_grad}
    shared = [p.data_ptr() == frozen[name] for name, p in two.named_parameters() if name in frozen]
    assert sum(shared) > 30 and sum(shared) >= len(shared) - 2  # all but the head that the adapter's stands for
    assert one.vblora.default.bank is two.vblora.default.bank


def test_bad_input_is_refused_in_a_line_and_leaves_nothing(train_bank, tables, tmp_path, capsys, monkeypatch):
    def refused(*arguments: str) -> str:
        assert train_bank(*arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith("vblora train-bank: error: ") and message.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return message

    films = tables[1]
    assert "there is one file, but a shared bank takes at least two" in refused("--data", films)
    assert "'films' names both" in refused("--data", films, "--data", films)
    assert "'Films' names both" in refused("--data", films, "--data", films.replace("films=", "Films="))
    assert "must be NAME=FILE" in refused("--data", films.partition("=")[2])
    assert "must be NAME=FILE" in refused("--data", f"../{films}")
    assert "--pair-column: there is no file 'x'; --data names 'films', 'ages'" in refused(
        *tables, "--pair-column", "x=y"
    )
    assert "'words' and 'text' are both for 'ages'" in refused(*tables, "--text-column", "ages=text")
    assert "has no column 'txt'" in refused(*tables, "--text-column", "txt")
    assert "the adapter does not fit" in refused(*tables, "--vector-length", "7")
    assert "is 'label', as is --pair-column" in refused(*tables, "--pair-column", "films=label")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "train-bank trains in one process, but 2 were started" in refused(*tables)


def test_adapters_are_those_of_the_seed(train_bank, tables, tmp_path, capsys):
    banks = []
    for seed in ("0", "0", "1"):
        few = ["--max-train", "16", "--max-eval", "4", "--epochs", "1", "--overwrite"]
        assert train_bank(*tables, "--seed", seed, *few) == 0
        banks.append(vblora.VectorBank.from_file(tmp_path / "out" / "bank.safetensors").vectors)
    assert "vblora train-bank: warning: 2 steps are few" in capsys.readouterr().err
    assert torch.equal(banks[0], banks[1]) and not torch.equal(banks[0], banks[2])
