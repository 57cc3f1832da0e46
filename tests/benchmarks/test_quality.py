"""`python -m benchmarks.quality`: it reads GLUE's layouts, learns, goes on where it was, and reports what it ran."""

import argparse
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import vblora
from benchmarks.quality import __main__ as quality
from benchmarks.quality import adapting, suites
from benchmarks.quality.arguments import parse
from benchmarks.quality.methods import CONFIGS, LANGUAGE_RECIPES, LANGUAGE_SPACES, RECIPES, SPACES, Recipe, draw
from benchmarks.quality.tasks import Example, Task, read_tasks
from tests.tables import make_rows

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = {
    "CoLA": ("gj04\t1\t\tThey sang.\nbc01\t0\t*\tThey sang on.\n", [(("They sang.",), 1), (("They sang on.",), 0)]),
    "SST-2": ('sentence\tlabel\na "fine" film \t1\nnot\t0\n', [(('a "fine" film',), 1), (("not",), 0)]),
    "MRPC": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe ran .\tHe did run .\n0\t9\t10\tA\tB\n",
        [(("He ran .", "He did run ."), 1), (("A", "B"), 0)],
    ),
    "STS-B": (
        "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tA\tB\t4.25\n1\tx\tC\tD\t0\n",
        [(("A", "B"), 4.25), (("C", "D"), 0.0)],
    ),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n1\tC\tD\tnot_entailment\ncut off\n",
        [(("A", "B"), 0), (("C", "D"), 1)],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, tmp_path):
    text, expected = LAYOUTS[name]
    (tmp_path / name).mkdir()
    for part in ("train", "dev"):
        (tmp_path / name / f"{part}.tsv").write_text(text, encoding="utf-8")
    (task,) = read_tasks(tmp_path)
    assert task.train == task.dev == expected
    assert bool(task.labels) == (name != "STS-B")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="Tasks in it: none"):
        read_tasks(tmp_path)
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_text("a\tb\nc\td\n")
    with pytest.raises(ValueError, match="columns a, b"):
        read_tasks(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no RTE.*Tasks in it: SST-2"):
        read_tasks(tmp_path, ["RTE"])


def test_rows_are_of_all_the_file_and_the_others_are_held_out(tmp_path):
    (tmp_path / "SST-2").mkdir()
    for part, rows in (("train", range(300)), ("dev", range(300, 310))):
        text = "".join(f"{row}\t{row % 2}\n" for row in rows)
        (tmp_path / "SST-2" / f"{part}.tsv").write_text(f"sentence\tlabel\n{text}")

    def numbers(examples: list[Example]) -> list[int]:
        return [int(example.texts[0]) for example in examples]

    (task,) = read_tasks(tmp_path, max_train=100)
    assert len(task.train) == 100 and numbers(task.dev) == list(range(300, 310))
    thirds = np.histogram(numbers(task.train), bins=[0, 100, 200, 300])[0]
    assert thirds.min() >= 20  # not of the beginning alone
    (other,) = read_tasks(tmp_path, max_train=100, held_out=True)
    assert other.train == task.train and sorted(numbers(other.train + other.dev)) == list(range(300))
    for none_left in (None, 300):
        with pytest.raises(ValueError, match=r"SST-2 has 300 training rows.*none is held out"):
            read_tasks(tmp_path, max_train=none_left, held_out=True)


def test_word_order_is_made_from_pairs(tmp_path):
    sentence = "the cat sat on the mat with number"
    rows = "".join(f"0\tx\t{sentence} {i}\t{sentence} {i + 1500}\t4.25\n" for i in range(1500))
    for task, header, text in (
        ("STS-B", "index\tgenre\tsentence1\tsentence2\tscore\n", rows),
        ("SST-2", "sentence\tlabel\n", "a b c d e f g\t1\n"),
    ):
        (tmp_path / task).mkdir()
        for part in ("train", "dev"):
            (tmp_path / task / f"{part}.tsv").write_text(header + text)
    (task,) = read_tasks(tmp_path, ["word-order"], max_train=900)
    assert [len(task.train), len(task.dev)] == [900, 1000] and task.metric == "accuracy"
    assert 0.4 < np.mean([example.label for example in task.train]) < 0.6
    for (text,), label in task.train:
        assert text.startswith(sentence) == bool(label)
        assert sorted(text.split())[1:] == sorted(sentence.split())  # after the number, which never moves
    assert task == read_tasks(tmp_path, ["word-order"], max_train=900)[0]
    with pytest.raises(FileNotFoundError, match="SST-2, STS-B"):
        read_tasks(tmp_path, ["CoLA"])


@pytest.mark.parametrize(
    ("name", "labels", "predicted", "score"),
    [
        ("MRPC", ["0", "1"], [1, 0, 1, 0], 75.0),
        ("CoLA", ["0", "1"], [1, 0, 1, 0], 100 / np.sqrt(3)),
        ("CoLA", ["0", "1"], [1, 1, 1, 1], 0.0),
        ("STS-B", [], [3.0, 1.0, 3.0, 3.0], 100.0),
    ],
)
def test_scores(name, labels, predicted, score):
    examples = [Example(("x",), label) for label in (1, 0, 1, 1)]

    assert Task(name, [], examples, labels).score(np.array(predicted)) == pytest.approx(score)


def test_a_setting_goes_where_its_name_belongs():
    changed = RECIPES["VB-LoRA"].changed({"lr_bank": 0.5, "topk": 3, "warm_up": 0.2})
    assert changed.rates["lr_bank"] == 0.5 and changed.config["topk"] == 3 and changed.warm_up == 0.2
    assert changed.config["r"] == RECIPES["VB-LoRA"].config["r"]
    assert Recipe(None).changed({}) == Recipe(None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lr_banc=1", "the methods that run have no 'lr_banc'. They have .*lora_alpha.*lr_bank"),
        ("lr_bank", "is 'lr_bank', but must be NAME=VALUE"),
        ("lr_factors=high", "LoRA r=8: lr_factors is 'high', but must be a number from 0 to 100"),
        ("topk=0", "VB-LoRA: `topk` is 0"),
        ("vector_length=16", None),
    ],
)
def test_settings_are_for_the_methods_that_have_them(given, message):
    arguments = argparse.Namespace(set=[given], methods=["frozen encoder", "LoRA r=8", "VB-LoRA"], search=None)
    if message is not None:
        with pytest.raises(ValueError, match=f"--set: {message}"):
            quality._recipes(arguments, suites.SUITES["glue"])
        return
    frozen, lora, ours = quality._recipes(arguments, suites.SUITES["glue"]).items()
    assert frozen == ("frozen encoder", RECIPES["frozen encoder"]) and lora == ("LoRA r=8", RECIPES["LoRA r=8"])
    assert ours == ("VB-LoRA [vector_length=16]", RECIPES["VB-LoRA"].changed({"vector_length": 16}))
    searched = quality._recipes(argparse.Namespace(**vars(arguments) | {"search": 4, "set": ["lr_bank=0.01"]}),
                                suites.SUITES["glue"])  # fmt: skip
    assert {recipe.rates["lr_bank"] for recipe in searched.values() if recipe.method == "vblora"} == {0.01}


@pytest.mark.parametrize(
    ("recipes", "spaces"), [(RECIPES, SPACES), (LANGUAGE_RECIPES, LANGUAGE_SPACES)], ids=["encoders", "language models"]
)
@pytest.mark.parametrize("method", CONFIGS)
def test_each_method_is_tuned_by_as_many_settings(method, recipes, spaces):
    recipe = next(recipe for recipe in recipes.values() if recipe.method == method)
    drawn = draw(recipe, spaces[method], 24)
    assert len(drawn) == 24 and drawn[0] == {} and drawn == draw(recipe, spaces[method], 24)
    tried = [recipe.changed(settings) for settings in drawn]
    assert not any(one.is_same(other) for one, other in itertools.combinations(tried, 2))
    for settings in drawn:
        changed = recipe.changed(settings)
        CONFIGS[method](**changed.config)  # has such fields
        reached = changed.rates | changed.config | {"warm_up": changed.warm_up}
        assert {name: reached[name] for name in settings} == settings


def test_a_frozen_bank_is_the_same_for_each_seed_and_not_the_adapters_own():
    recipe = LANGUAGE_RECIPES["VB-LoRA, frozen bank"].changed({"num_vectors": 8, "vector_length": 4, "r": 2})
    assert recipe.tuned_as in LANGUAGE_SPACES and "lr_bank" not in recipe.settings and "lr_scales" in recipe.settings
    models = [nn.Sequential(nn.Linear(4, 8)) for _ in range(2)]
    groups = [adapting.adapt(model, recipe, seed) for seed, model in enumerate(models)]
    one, other = (model.get_parameter("vblora.default.bank.vectors") for model in models)
    assert torch.equal(one, other) and not one.requires_grad and one.abs().max() > 0.04
    rows = 2 * (1 + 2)
    assert {group["name"]: [p.numel() for p in group["params"]] for group in groups[0]}["scales"] == [rows]
    stored = vblora.count_parameters(models[0]).stored - recipe.shared
    assert stored == 8  # 6 weights and 6 bytes of indices, rounded up


def test_a_bank_of_int8_is_rounded_before_it_is_scored(tmp_path):
    settings = {"num_vectors": 8, "vector_length": 4, "r": 2, "target_modules": ["0"]}
    recipe = LANGUAGE_RECIPES["VB-LoRA, int8 bank"].changed(settings)
    model, fresh = nn.Sequential(nn.Linear(4, 8)), nn.Sequential(nn.Linear(4, 8))
    fresh.load_state_dict(model.state_dict())
    adapting.adapt(model, recipe, 0)
    inputs = torch.randn(3, 4)
    exact = model.eval()(inputs)
    vblora.save(model, tmp_path, form="deploy", bank_dtype=torch.int8)
    stored = adapting.as_stored(model, recipe)
    assert stored["bytes"] == 8 * (4 + 4) + 6 * 4 + 3  # vectors and scales, 6 weights, 6 indices of 3 bits
    assert stored["stored"] == 8 * 4 + 8
    assert not torch.equal(model(inputs), exact)
    torch.testing.assert_close(model(inputs), vblora.load(fresh, tmp_path).eval()(inputs))


def test_no_more_settings_are_drawn_than_there_are():
    drawn = draw(RECIPES["frozen encoder"], SPACES[None], 12)  # three rates of the head by three warm-ups
    assert len(drawn) == 10 and all(drawn.count(settings) == 1 for settings in drawn)


def test_a_recipe_whose_settings_are_in_the_space_is_not_drawn_again():
    recipe = LANGUAGE_RECIPES["LoRA r=8"]
    space = {"lr_factors": (4e-3,), "lora_dropout": (0.0, 0.1)}  # the first is its own, and the config's default
    assert draw(recipe, space, 9) == [{}, {"lr_factors": 4e-3, "lora_dropout": 0.1}]


def test_a_search_tries_the_better_half_on_all_tasks(tmp_path, monkeypatch, capsys):
    for task in ("A", "B"):
        (tmp_path / task).mkdir()
        for part in ("train", "dev"):
            (tmp_path / task / f"{part}.tsv").write_text("sentence\tlabel\nx\t0\ny\t1\n")
    ran = []

    def run(task: Task, recipe: Recipe, seed: int, settings) -> dict:
        ran.append((task.name, recipe.method, recipe))
        rate = recipe.rates["lr_bank" if recipe.method == "vblora" else "lr_factors"]
        about = {"stored": 1, "bytes": 4, "seconds": 1.0, "steps": 1, "losses": [1.0], "exhausted": 0}
        score = 100 * rate + 1000 * recipe.warm_up
        if len(ran) == 3:
            score = float("nan")  # diverged
        return about | {"score": score, "scores": {"accuracy": score}}

    monkeypatch.setitem(suites.SUITES, "glue", suites.SUITES["glue"]._replace(run=run))
    options = ["--methods", "VB-LoRA", "LoRA r=8", "--search", "5", "--seeds", "1", "--processes", "1"]
    options += ["--held-out", "--max-train", "1"]
    (tmp_path / "config.json").write_text("{}")
    paths = ["--data", str(tmp_path), "--model", str(tmp_path), "--output", str(tmp_path / "runs.jsonl")]
    monkeypatch.setattr("sys.argv", ["quality", *options, *paths])
    assert quality.main() == 0
    for method in ("vblora", "lora"):
        first = [recipe for task, of, recipe in ran if (task, of) == ("A", method)]
        second = [recipe for task, of, recipe in ran if (task, of) == ("B", method)]
        assert len(first) == 5 and len(second) == 3 and all(recipe in first for recipe in second)
        assert {recipe.warm_up for recipe in first} > {recipe.warm_up for recipe in second}
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "LoRA" in line]
    means = [float(row[-2]) for row in rows]
    assert len(rows) == 6 and means[:3] == sorted(means[:3])[::-1] and means[3:] == sorted(means[3:])[::-1]
    assert not (tmp_path / "runs.png").exists()


def test_seconds_are_those_of_the_middle_seed_and_an_interrupted_run_continues(tmp_path, monkeypatch, capsys):
    (tmp_path / "A").mkdir()
    for part in ("train", "dev"):
        (tmp_path / "A" / f"{part}.tsv").write_text("sentence\tlabel\nx\t0\ny\t1\n")

    def run(task: Task, recipe: Recipe, seed: int, settings) -> dict:
        about = {"score": 50.0, "scores": {"accuracy": 50.0}, "stored": 1, "bytes": 4}
        about |= {"steps": 7, "losses": [1.0], "exhausted": 0}
        ran.append(seed)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return about | {"seconds": (20.0, 700.0, 30.0)[seed]}

    ran: list[int] = []

    monkeypatch.setitem(suites.SUITES, "glue", suites.SUITES["glue"]._replace(run=run))
    (tmp_path / "config.json").write_text("{}")
    paths = ["--data", str(tmp_path), "--model", str(tmp_path), "--output", str(tmp_path / "runs.jsonl")]
    monkeypatch.setattr("sys.argv", ["quality", "--methods", "VB-LoRA", "--processes", "1", *paths])
    assert quality.main() == 130
    assert "the same command continues with the others" in capsys.readouterr().err
    with open(tmp_path / "runs.jsonl", "a") as file:
        file.write('{"key": {"bf')  # killed while it wrote
    assert quality.main() == 0
    assert ran == [0, 1, 2, 2] and len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3
    table = capsys.readouterr().out
    (row,) = [line for line in table.splitlines() if line.startswith("| VB-LoRA")]
    assert row == "| VB-LoRA | 1 | 4 | 3 | 50.0 ± 0.0 | 30 |"
    assert "Steps of 16 rows: 7 on A." in table
    (tmp_path / "runs.jsonl").write_text("nothing\n")
    assert quality.main() == 2
    assert "line 1 of" in capsys.readouterr().err


def test_learns_and_goes_on_where_it_was(tiny_model, tmp_path, monkeypatch, capsys):
    for part, count in (("train", 240), ("dev", 60)):
        (tmp_path / "SST-2").mkdir(exist_ok=True)
        rows = [f"{row['text']}\t{row['label']}\n" for row in make_rows(count, seed=count)]
        (tmp_path / "SST-2" / f"{part}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    ran, glue = [], suites.SUITES["glue"]
    counting = glue._replace(run=lambda *arguments: ran.append(arguments) or glue.run(*arguments))
    monkeypatch.setitem(suites.SUITES, "glue", counting)

    def command(*more: str) -> list[dict]:
        output = tmp_path / "out" / "runs.jsonl"
        names = ["--methods", "frozen encoder", "VB-LoRA, query and value", "--seeds", "2", "--epochs", "20"]
        monkeypatch.setattr("sys.argv", ["quality", "--data", str(tmp_path), "--model", str(tiny_model), *names])
        monkeypatch.setattr("sys.argv", [*quality.sys.argv, "--output", str(output), "--processes", "1"])
        monkeypatch.setattr("sys.argv", [*quality.sys.argv, "--precision", "float32", *more])
        assert quality.main() == 0
        return [json.loads(line) for line in output.read_text().splitlines()]

    fits = [
        "--set",
        "vector_length=16",
        "num_vectors=24",
        "lr_bank=0.02",
        "init_vector_bank_bound=0.5",
        "scaling=1",
        "lr_logits=0.01",
    ]
    runs = command(*fits)
    assert len(ran) == len(runs) == 4
    frozen, adapted = (run["result"]["losses"][-1] for run in runs[:2])
    assert adapted < 0.95 * frozen
    assert runs[0]["result"]["stored"] == 0
    rows = 2 * 2 * 4 * (32 + 32) // 16  # layers, query and value, r
    assert runs[1]["result"]["stored"] == 24 * 16 + rows * 2 * 5 // 4
    packed = rows * 2 * 5 // 8  # indices, of 5 bits
    assert runs[0]["result"]["bytes"] == 0 and runs[1]["result"]["bytes"] == 4 * (24 * 16 + rows * 2) + packed
    del runs[-1]
    (tmp_path / "out" / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    ran.clear()
    assert len(command(*fits)) == 4 and len(ran) == 1  # what was missing
    assert "VB-LoRA, query and value" in capsys.readouterr().out
    others = command(*fits, "--precision", "bfloat16", "--epochs", "1", "--seeds", "1")[4:]
    assert [run["key"]["bfloat16"] for run in others] == [True, True]
    assert "Computed in bfloat16 autocast." in capsys.readouterr().out


@pytest.mark.parametrize("suite", ["glue", "chat"])
@pytest.mark.parametrize("fast", [False, True])
def test_the_processor_decides_the_precision(suite, fast, tiny_model, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    for given, expected in (("auto", fast), ("bfloat16", True), ("float32", False)):
        options = [*(["--data", "x"] if suite == "glue" else []), "--model", str(tiny_model), "--precision", given]
        monkeypatch.setattr("sys.argv", ["quality", "--suite", suite, *options])
        assert suites.SUITES[suite].settings(parse("")).bfloat16 is expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "glue", "--steps", "3"], "--steps is not an option of --suite glue"),
        (["--suite", "e2e", "--epochs", "3"], "--epochs is not an option of --suite e2e"),
        (["--suite", "chat", "--max-prompts", "3"], "--max-prompts is not an option of --suite chat"),
        (["--suite", "chat", "--data", "x"], "--data is not an option of --suite chat"),
        (["--suite", "chat", "--methods", "LoRA"], "'LoRA' is none of chat's: frozen, LoRA r=8"),
        (["--suite", "e2e"], "give --data, or set E2E"),
        (["--suite", "chat", "--seeds", "0"], "must be 1 or more"),
        (["--suite", "chat", "--search", "3"], "--search: add --held-out"),
    ],
)
def test_what_does_not_belong_is_refused(options, message, monkeypatch, capsys):
    monkeypatch.delenv("E2E", raising=False)
    monkeypatch.setattr("sys.argv", ["quality", *options])
    with pytest.raises(SystemExit) as error:
        parse("")
    assert error.value.code == 2 and message in capsys.readouterr().err
