"""`python -m benchmarks.sharing`: what it trains, what it leaves out, and that factors of sub-vectors need no new file format."""

import json
from dataclasses import replace

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
from vblora.checkpoint import folder
from vblora.checkpoint.save_load import contents_of
from vblora.model.record import attached_adapter

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"r": 2, "num_vectors": 16, "vector_length": 16}
IDS = torch.arange(3, 17).view(2, 7)


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


def test_a_factor_starts_without_an_update_and_goes_into_the_deploy_form(tmp_path):
    torch.manual_seed(0)
    model, base = bert().eval(), bert().eval()
    base.load_state_dict(model.state_dict())
    groups = adapt(
        model, Variant("random", scale=True, **SMALL), 0, vblora.VectorBank(16, 16, 1.0), train_bank=False, start=None
    )
    assert torch.equal(model(IDS).logits, base(IDS).logits)  # every B is 0
    with torch.no_grad():
        for group in groups[:2]:
            group["params"][0].add_(torch.randn_like(group["params"][0]))
    adapter = model.vblora["default"]
    contents = replace(contents_of(attached_adapter(model)), rows=adapter.deployed())
    folder.write(contents, tmp_path / "a", form="deploy")
    loaded = vblora.load(base, tmp_path / "a")
    assert (loaded.vblora.default.weights < 0).any()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_what_a_user_stores():
    sizes = {}
    for name, variant in {
        "own": Variant(**SMALL), "int8": Variant(int8=True, **SMALL), "shared": Variant("random", scale=True, **SMALL),
        "delta": Variant("random", delta=2, **SMALL),
    }.items():  # fmt: skip
        model = bert()
        adapt(model, variant, 0, vblora.VectorBank(16, 16), train_bank=variant.bank == "own", start=None)
        sizes[name] = training.user_bytes(model.vblora["default"], variant)
    mixtures = model.vblora["default"].num_subvectors * 2 * (4 + 0.5)  # k weights, k indices of 4 bits
    assert sizes == {"own": mixtures + 1024, "int8": mixtures + 256 + 64, "shared": mixtures, "delta": mixtures + 256}


def test_runs_each_once_and_compares_with_the_first(tiny_model, tmp_path, monkeypatch, capsys):
    examples = [Example((row["text"],), int(row["label"] == "fresh")) for row in make_rows(48)]
    read = []

    def read_small(name, glue, e2e, rows, *, report=False):
        read.append((name, report))
        return Task(name, examples[:32], examples[32:], ["0", "1"])

    small = {"own": Variant(**SMALL), "shared": Variant("shared", scale=True, start=True, **SMALL)}
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
    state, about = training.train_bank(some, Variant(**SMALL), 0, settings)
    assert about["scores"].keys() == {"a", "b"} and len(about["losses"]) == 2
    by_one, _ = training.train_bank(some[:1], Variant(**SMALL), 0, settings)
    for name in ("bank", "logits"):
        assert not torch.equal(state[name], by_one[name])
    before = state["bank"].clone()
    training.run(some[0], Variant("shared", scale=True, **SMALL), 0, settings, state)
    assert torch.equal(state["bank"], before)
