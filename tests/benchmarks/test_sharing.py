"""`python -m benchmarks.sharing`: what it trains and what it leaves out."""

import json

import pytest
import torch

import vblora
from benchmarks.quality.tasks import Example, Task
from benchmarks.sharing import __main__ as sharing
from benchmarks.sharing import tasks, training
from benchmarks.sharing.adapter import adapt
from benchmarks.sharing.variants import Variant
from tests.small_models import bert
from tests.tables import make_rows

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"r": 2, "num_vectors": 16, "vector_length": 16}


def test_e2e_pairs_differ_in_one_value_where_the_label_says_so(tmp_path):
    text = "".join(
        f'"name[{name}], food[{food}], near[Z]",{name} has {food} food.\n'
        for name in "AB"
        for food in ("Thai", "Fast", "Tea")
    )
    for name in ("devset.csv", "testset_w_refs.csv"):
        (tmp_path / name).write_text("mr,ref\n" + text * 10)
    task = tasks.read("E2E", tmp_path, tmp_path, tasks.Rows(20, 10, 15))
    assert (len(task.train), len(task.dev)) == (20, 10)
    assert len(tasks.read("E2E", tmp_path, tmp_path, tasks.Rows(20, 10, 15), report=True).dev) == 15
    for (data, sentence), label in task.train + task.dev:
        name, _, food = sentence.removesuffix(" food.").partition(" has ")
        assert data.startswith(f"name: {name}, food: ") and data.endswith(", near: Z")
        assert label == int(f"food: {food}," in data)
    assert {example.label for example in task.train} == {0, 1}


def test_a_bank_is_not_trained_on_the_task_or_its_relatives():
    assert set(tasks.others("SST-2")) == {"MRPC", "STS-B", "E2E"}
    assert set(tasks.others("MRPC")) == {"SST-2", "STS-B", "E2E", "Rotten Tomatoes"}


def test_what_a_user_stores():
    sizes = {}
    for name, variant in {
        "own": Variant(**SMALL), "int8": Variant(int8=True, **SMALL), "shared": Variant("random", train_scales=True, **SMALL),
    }.items():  # fmt: skip
        model = bert()
        adapt(model, variant, 0, vblora.VectorBank(16, 16), train_bank=variant.bank == "own")
        sizes[name] = training.user_bytes(model, variant)
    mixtures = model.vblora["default"].num_subvectors * 2 * (4 + 0.5)  # k weights, k indices of 4 bits
    assert sizes == {"own": mixtures + 1024, "int8": mixtures + 256 + 64, "shared": mixtures}


def test_runs_each_once_and_compares_with_the_first(tiny_model, tmp_path, monkeypatch, capsys):
    examples = [Example((row["text"],), int(row["label"] == "fresh")) for row in make_rows(48)]
    read = []

    def read_small(name, glue, e2e, rows, *, report=False):
        read.append((name, report))
        return Task(name, examples[:32], examples[32:], ["0", "1"])

    small = {"own": Variant(**SMALL), "shared": Variant("shared", train_scales=True, **SMALL)}
    monkeypatch.setattr(tasks, "read", read_small)
    monkeypatch.setattr(sharing, "VARIANTS", small)
    out = tmp_path / "runs.jsonl"
    command = [
        "--glue",
        "x",
        "--e2e",
        "x",
        "--model",
        tiny_model,
        "--tasks",
        "SST-2",
        "--precision",
        "float32",
        "--report",
    ]
    command = [*map(str, command), "--output", str(out), "--epochs", "1", "--variants", "own", "shared"]
    assert sharing.main(command) == 0
    assert read == [("SST-2", True), ("SST-2", True), ("MRPC", False), ("STS-B", False), ("E2E", False)]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["own", "shared"]
    assert lines[1]["result"]["bytes"] < lines[0]["result"]["bytes"]
    read.clear()
    assert sharing.main(command) == 0
    assert not read and len(out.read_text().splitlines()) == 2
    score = lines[0]["result"]["score"]
    assert f"| own | {lines[0]['result']['bytes']:,} (100%) | {score:.1f} (+0.0) | +0.0 |" in capsys.readouterr().out


def test_a_shared_bank_is_trained_by_all_its_tasks_and_frozen_for_another(tiny_model):
    examples = [Example((row["text"],), int(row["label"] == "fresh")) for row in make_rows(40)]
    some = [Task(name, examples[:32], examples[32:], ["0", "1"]) for name in ("a", "b")]
    settings = training.Settings(tiny_model, bfloat16=False, epochs=1)
    bank, about = training.train_bank(some, Variant(**SMALL), 0, settings)
    assert about["scores"].keys() == {"a", "b"} and len(about["losses"]) == 2
    by_one, _ = training.train_bank(some[:1], Variant(**SMALL), 0, settings)
    assert not torch.equal(bank, by_one)
    before = bank.clone()
    training.run(some[0], Variant("shared", train_scales=True, **SMALL), 0, settings, bank)
    assert torch.equal(bank, before)
