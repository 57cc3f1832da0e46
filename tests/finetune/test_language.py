"""`vblora finetune --task causal-lm`, on a tiny Llama."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import vblora
from tests.finetune.chats import TEMPLATE, make_chats, make_pairs, make_tokenizer, save_model, write_jsonl
from tests.small_models import relative_error
from vblora.cli import main
from vblora.finetune import fitting, texts

pytest.importorskip("trl")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def pairs(tmp_path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", make_pairs(60))


@pytest.fixture
def finetune(base: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*arguments: str | Path, output: str = "out") -> int:
        fixed = ["--task", "causal-lm", "--model", base, "--output", tmp_path / output, "--precision", "float32"]
        adapter = ["--r", "2", "--num-vectors", "16", "--vector-length", "16", "--max-new-tokens", "4"]
        return main(["finetune", *map(str, [*fixed, *adapter, *arguments])])

    return run


def results_of(folder: Path) -> dict:
    return json.loads((folder / "finetune.json").read_text())


def load(base: Path, adapter: Path | None):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return model if adapter is None else vblora.load(model, adapter)


def held_out_loss(model, base: Path, rows: list[dict]) -> float:
    """The mean over the tokens of all completions, one row at a time, by cross-entropy of the logits."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    losses = []
    for row in rows:
        asked = f"<|im_start|> user {row['prompt']} <|im_end|> <|im_start|> assistant"
        start = len(tokenizer(asked).input_ids)
        ids = tokenizer(f"{asked} {row['completion']} <|im_end|>", return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        losses.append(F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.mark.usefixtures("rendered")
def test_trains_measures_saves_and_reloads(finetune, base, pairs, tmp_path, capsys):
    rows = make_pairs(7, seed=1)
    rows[0]["completion"] += " the film" * 5  # batches whose tokens differ in number
    columns = [{name.upper(): value for name, value in row.items()} for row in rows]  # another spelling than in --data
    held_out = write_jsonl(tmp_path / "held_out.jsonl", columns)
    pytest.importorskip("sacrebleu")
    options = ["--eval-data", held_out, "--epochs", "4", "--batch-size", "4", "--lr-bank", "0.1", "--bleu", "5"]
    assert finetune("--data", pairs, *options) == 0
    printed = capsys.readouterr()
    saved = results_of(tmp_path / "out")
    results = saved["results"]

    assert results["loss_before"] == pytest.approx(held_out_loss(load(base, None), base, rows), rel=1e-5)
    assert results["loss_after"] == pytest.approx(held_out_loss(load(base, tmp_path / "out"), base, rows), rel=1e-5)
    assert results["loss_after"] < 0.9 * results["loss_before"]
    assert results["perplexity_after"] == pytest.approx(math.exp(results["loss_after"]))
    losses = [entry["eval_loss"] for entry in saved["log"] if "eval_loss" in entry]
    assert results["loss_after"] == min(losses)  # the best of all epochs
    assert "Loaded again" in printed.out and "bit for bit" in printed.out
    assert f"Use it with: vblora generate --adapter {tmp_path / 'out'} --prompt" in printed.out
    assert results["steps"] == 60 == len([entry for entry in saved["log"] if "loss" in entry])

    widths = 2 * (2 * 64 + 2 * 48 + 3 * 96)
    assert results["lora_bytes"] == 4 * 8 * widths
    assert results["trainable"] == 16 * 16 + 16 * (2 * widths // 16)
    assert results["file_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("adapter_*"))
    for figure in ("trainable", "stored"):
        assert f"{results[figure]:,}" in printed.out
    assert len(results["generations"]) == 3
    assert {"bleu_before", "bleu_after", "tokens_per_second", "best_epoch"} <= results.keys()
    assert {"training.png", "bank.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert saved["bank"]["vectors"] == 16
    assert saved["rows"] == "prompt" and saved["chat_template"] == "auto" and saved["ends"] == [5]


def test_packing_has_the_same_rows_in_fewer_steps(finetune, pairs, tmp_path):
    for output, options in {"rows": [], "packed": ["--packing", "--max-length", "64"]}.items():
        assert finetune("--data", pairs, "--epochs", "1", "--batch-size", "2", *options, output=output) == 0
    rows, packed = (results_of(tmp_path / output)["results"] for output in ("rows", "packed"))
    assert packed["steps"] < rows["steps"] / 2
    assert packed["loss_before"] == pytest.approx(rows["loss_before"], rel=1e-5)
    assert packed["tokens"] == rows["tokens"]


def test_chats_and_long_rows(finetune, tmp_path, capsys):
    chats = make_chats(30)
    chats[0]["messages"][0]["content"] = "the cat " * 30  # nothing to learn in its first 40 tokens
    chats[1]["messages"][1]["content"] = "the cat " * 30
    data = write_jsonl(tmp_path / "chats.jsonl", chats)
    assert finetune("--data", data, "--epochs", "1", "--max-length", "40", "--accumulate", "2") == 0
    error = capsys.readouterr().err
    assert re.search(r"of \d+ rows are longer than 40 tokens and are cut off; 1 of them are left out", error)
    results = results_of(tmp_path / "out")["results"]
    assert results["left_out_rows"] == 1 and results["cut_rows"] == 2
    assert results["train_rows"] + results["held_out_rows"] == 29
    assert results["steps"] == math.ceil(math.ceil(results["train_rows"] / 8) / 2)


def test_prompts_are_cut_out_of_plain_texts(tmp_path):
    """Also of those without spaces; a single character leaves none."""
    from vblora.finetune import language

    rows = ["one two three four", "你好世界", " five six", "x"]
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": row} for row in rows])
    columns = texts.find_columns(path, "--data", dict.fromkeys(["text", "prompt", "completion", "messages"]))
    encoder = language.Encoder(make_tokenizer(), chat=False)
    found = language._first_prompts(texts.whole(path, columns, "--data", None, 0), 9, encoder)
    assert [(example.prompt, references) for example, references in found] == [
        ("one two", [" three four"]), ("你好", ["世界"]), (" five", [" six"])
    ]  # fmt: skip


def test_what_a_tool_call_is_shown_as(tmp_path):
    """It may have no content."""
    from vblora.finetune import language

    calls = [{"function": {"name": "look_up"}}]
    chat = make_chats(1)[0]["messages"][:1]
    message = {"role": "assistant", "tool_calls": calls}
    path = write_jsonl(
        tmp_path / "chats.jsonl",
        [{"messages": [*chat, said, *chat]} for said in (message, message | {"content": None})],
    )
    columns = texts.find_columns(path, "--data", dict.fromkeys(["text", "prompt", "completion", "messages"]))
    encoder = language.Encoder(make_tokenizer(), chat=True)
    [(_, references)] = language._first_prompts(texts.whole(path, columns, "--data", None, 0), 9, encoder)
    assert references == [json.dumps(calls)] * 2
    assert language._as_text(texts.Example([message], "")) == f"assistant: {json.dumps(calls)}"


@pytest.mark.parametrize(
    ("completion", "told"), [("Paris", True), (" Paris", False), ("\nParis", False), ("你好", False)]
)
def test_says_that_prompts_and_completions_are_joined_without_a_space(completion, told, capsys):
    from vblora.finetune import language

    language._warn_of_joined([texts.Example("The capital of France?", completion)] * 2)
    assert (
        "no space is between prompts and completions: 'e capital of France?Paris'" in capsys.readouterr().err
    ) == told


@pytest.mark.parametrize(("end", "told"), [("<|im_end|>", False), (".", True)])
def test_says_that_the_chat_template_teaches_no_end(end, told, tmp_path, capsys):
    from vblora.finetune import language
    from vblora.finetune.task import LanguageTask

    path = write_jsonl(tmp_path / "rows.jsonl", make_pairs(1))
    columns = texts.find_columns(path, "--data", dict.fromkeys(["text", "prompt", "completion", "messages"]))
    rows = texts.whole(path, columns, "--data", None, 0)
    task = LanguageTask("model", TEMPLATE.replace("<|im_end|>", end), rows, rows)
    arguments = Namespace(chat_template="template.jinja", loss="completions")
    language.make_encoder(arguments, make_tokenizer(), task)
    assert ("so the model does not learn to stop" in capsys.readouterr().err) == told


def test_a_row_that_is_refused_as_it_is_tokenised_is_one_line(finetune, tmp_path, capsys):
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('no user') }}")
    data = write_jsonl(tmp_path / "chats.jsonl", make_chats(4))
    assert finetune("--data", data, "--chat-template", template) == 2
    assert re.search(r"error: the chat template fails on .*: no user$", capsys.readouterr().err.strip())
    assert not (tmp_path / "out").exists()


def tensors(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ctrl_c_leaves_a_checkpoint_from_which_training_goes_on_exactly(
    finetune, base, pairs, tmp_path, capsys, monkeypatch
):
    from vblora.finetune import fitting

    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    options = ["--data", pairs, "--epochs", "2", "--batch-size", "4", "--lr-bank", "0.05", "--chat-template", template]
    assert finetune(*options, output="whole") == 0
    on_step_end = fitting._Progress.on_step_end

    def interrupt(self, args, state, control, **more):
        on_step_end(self, args, state, control, **more)
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(fitting._Progress, "on_step_end", interrupt)
    assert finetune(*options) == 130
    assert "interrupted after step 5 of 26" in (error := capsys.readouterr().err)
    assert "Give the same command with --resume to continue from step 5." in error
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "out" / "checkpoint-5"))
    load(base, tmp_path / "out")
    monkeypatch.undo()

    assert finetune(*options, "--resume", "--epochs", "1") == 2
    assert "was trained with --epochs 2, but it is 1 now. A run can be made longer" in capsys.readouterr().err
    assert finetune(*options, "--resume", "--r", "3") == 2
    assert "--resume: the checkpoint was trained with --r 2, but it is 3 now" in capsys.readouterr().err
    rows = Path(pairs).read_bytes()
    Path(pairs).write_bytes(rows + rows.splitlines(keepends=True)[-1])
    assert finetune(*options, "--resume") == 2
    assert f"--resume: --data {pairs} has changed since the checkpoint." in capsys.readouterr().err
    Path(pairs).write_bytes(rows)
    template.write_text(f"{TEMPLATE} ")
    assert finetune(*options, "--resume") == 2
    assert f"--resume: --chat-template {template} has changed since the checkpoint." in capsys.readouterr().err
    template.write_text(TEMPLATE)
    stated = (tmp_path / "out" / "checkpoint-5" / "finetune.json").read_text()
    weight, digest = next(iter(json.loads(stated)["fingerprint"].items()))
    (tmp_path / "out" / "checkpoint-5" / "finetune.json").write_text(stated.replace(digest, "of another model"))
    assert finetune(*options, "--resume") == 2
    assert (
        f"--resume: the weights of --model {base} have changed" in (error := capsys.readouterr().err)
        and weight in error
    )
    (tmp_path / "out" / "checkpoint-5" / "finetune.json").write_text(stated)
    assert finetune(*options) == 2  # the folder is not empty
    assert finetune(*options, "--resume") == 0
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))
    one, other = (results_of(tmp_path / name)["results"] for name in ("out", "whole"))
    assert one["tokens"] == other["tokens"]
    assert one["loss_after"] == other["loss_after"] and one["steps"] == other["steps"] == 26

    assert "nothing was left to train" not in capsys.readouterr().err
    assert finetune(*options, "--resume") == 0
    printed = capsys.readouterr()
    assert "nothing was left to train" in printed.err and re.search(r"tokens per second +│ +│ +– │", printed.out)
    results = results_of(tmp_path / "out")["results"]
    assert results["seconds_per_step"] is results["tokens_per_second"] is None
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))

    assert "library_name: vblora" in (tmp_path / "out" / "README.md").read_text()  # and not TRL's card

    assert finetune(*options, "--overwrite", "--epochs", "1") == 0
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-13"]


def test_the_best_epoch_is_kept_and_training_stops_early(finetune, pairs, tmp_path, monkeypatch):
    from vblora.finetune import language

    evaluate = language._Trainer.evaluation_loop
    losses = iter([9.0, 3.0, 2.0, 4.0, 5.0, 1.0])  # the first is before training

    def pretended(self, *args, **kwargs):
        output = evaluate(self, *args, **kwargs)
        output.metrics["eval_loss"] = next(losses)
        return output

    monkeypatch.setattr(language._Trainer, "evaluation_loop", pretended)
    assert finetune("--data", pairs, "--epochs", "9", "--patience", "2") == 0
    results = results_of(tmp_path / "out")["results"]
    assert results["steps"] == 4 * 7 and results["best_epoch"] == 2 and results["loss_after"] == 2.0
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "out" / "checkpoint-14"))
    assert (tmp_path / "out" / "checkpoint-28").is_dir()  # to go on from


def test_two_processes_train_as_one_with_twice_the_batch(finetune, base, tmp_path):
    # In which order processes see rows is accelerate's affair, so all are the same.
    same = write_jsonl(tmp_path / "same.jsonl", make_pairs(1) * 48)
    # The second process repeats a row to fill its batch. That row is the longest, and counts once.
    rows = make_pairs(7, seed=1)
    rows[0]["completion"] += " the film" * 5
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows)
    options = ["--data", same, "--eval-data", held_out, "--epochs", "1", "--lr-bank", "0.05"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "vblora.finetune",
    ]
    fixed = ["--task", "causal-lm", "--model", base, "--output", tmp_path / "two", "--precision", "float32"]
    # torchrun takes --r for one of its own options, cut short
    adapter = ["--rank", "2", "--num-vectors", "16", "--vector-length", "16", "--max-new-tokens", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = subprocess.Popen(
        [str(word) for word in [*command, *fixed, *adapter, *options, "--batch-size", "4", "--gradient-checkpointing"]],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert finetune(*options, "--batch-size", "8", output="one") == 0
    printed = started.communicate(timeout=300)[0]
    assert started.returncode == 0, printed
    assert printed.count("Held-out rows and size") == printed.count("rows to train on") == 1
    one, two = (results_of(tmp_path / name)["results"] for name in ("one", "two"))
    assert one["steps"] == two["steps"]
    assert two["loss_before"] == pytest.approx(one["loss_before"], rel=1e-5)
    assert [shown["before"] for shown in two["generations"]] == [shown["before"] for shown in one["generations"]]
    assert two["loss_after"] == pytest.approx(one["loss_after"], rel=1e-4)
    vectors = [tensors(tmp_path / name)["bank.vectors"] for name in ("one", "two")]
    assert relative_error(vectors[1], vectors[0]) < 1e-3


def test_the_held_out_loss_of_a_mixture_of_experts_is_that_of_its_tokens(finetune, tmp_path):
    """TRL adds that of its router, which balances the experts, to the loss that trains."""
    from transformers import MixtralConfig, MixtralForCausalLM

    base = tmp_path / "mixtral"
    make_tokenizer().save_pretrained(base)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 64}
    experts = {"num_local_experts": 2, "router_aux_loss_coef": 1.0, "output_router_logits": True}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    MixtralForCausalLM(MixtralConfig(vocab_size=24, pad_token_id=0, **sizes, **experts, **heads)).save_pretrained(base)
    rows = make_pairs(8)
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = ["--data", data, "--eval-data", data, "--epochs", "1", "--target-modules", "q_proj"]
    assert finetune(*options, "--model", base) == 0
    for name, adapter in (("loss_before", None), ("loss_after", tmp_path / "out")):
        expected = held_out_loss(load(base, adapter), base, rows)
        assert results_of(tmp_path / "out")["results"][name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_the_rows_that_tokens_are_of(packed):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from vblora.finetune.language import rows_of

    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)
    batch = collate([{"input_ids": [7] * length, "labels": [7] * length} for length in (3, 2)])
    rows = rows_of(batch).expand_as(batch["labels"])
    assert rows[batch["input_ids"] != 0].tolist() == [0, 0, 0, 1, 1]


def test_a_wrong_argument_is_refused_before_the_data_is_read(finetune, tmp_path, capsys, monkeypatch):
    from vblora.finetune import task

    monkeypatch.setattr(task, "read_language_task", lambda _: pytest.fail("reads the data"))
    data = write_jsonl(tmp_path / "rows.jsonl", make_pairs(4))
    for wrong in (["--resume"], ["--topk", "17"], ["--bank", tmp_path / "none"], ["--num-candidates", "1"]):
        assert finetune("--data", data, *wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_base_of_four_bits(finetune, pairs, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    from vblora.finetune import fitting

    fit = fitting.fit
    trained = []

    def seen(arguments, task, trainer, checkpoint):
        trained.extend(p for p in trainer.model.parameters() if p.requires_grad)
        assert {p.dtype for p in trained} == {torch.float32}  # SFTTrainer makes them bfloat16
        assert any(type(layer).__name__ == "Linear4bit" for layer in trainer.model.modules())
        return fit(arguments, task, trainer, checkpoint)

    monkeypatch.setattr(fitting, "fit", seen)
    assert finetune("--data", pairs, "--epochs", "2", "--load-in", "4bit", "--lr-bank", "0.05") == 0
    results = results_of(tmp_path / "out")["results"]
    assert len(trained) == 2 and results["loss_after"] < results["loss_before"]


def test_plain_texts_are_packed_without_a_loss_and_continued(finetune, tmp_path):
    rows = [{"text": "the cat is good . " * 12 + row["completion"]} for row in make_pairs(40)]  # 65 tokens with the end
    data = write_jsonl(tmp_path / "texts.jsonl", rows)
    assert finetune("--data", data, "--epochs", "1", "--packing", "--max-length", "32", "--max-train", "30") == 0
    report = results_of(tmp_path / "out")
    assert report["results"]["tokens"] == 30 * 66 and report["chat_template"] == "none"
    assert all(one["prompt"].startswith("the cat is good") for one in report["results"]["generations"])


@pytest.mark.parametrize(
    ("recipe", "language", "epochs", "steps", "expected"),
    [
        ("paper", True, 1, 59, "59 steps are few"),
        ("paper", True, 1, 60, None),
        ("paper", False, 19, 999, "this run has 19. Give --epochs 20"),
        ("paper", False, 20, 59, None),
        ("auto", False, 19, 59, "59 steps are few"),
    ],
)
def test_the_papers_rates_take_many_epochs_of_classifiers_alone(capsys, recipe, language, epochs, steps, expected):
    arguments = Namespace(recipe=recipe, epochs=epochs, batch_size=8)
    said = fitting.warn_of_few_steps(arguments, 100, steps, language=language)
    assert said is None if expected is None else expected in said
    error = capsys.readouterr().err
    assert not error if expected is None else expected in error


@pytest.mark.parametrize(
    ("accumulate", "advised"), [(1, "or --batch-size 4."), (2, "or --batch-size 2."), (8, "steps.")]
)
def test_the_advised_batch_is_one_of_several_in_a_step(accumulate, advised):
    arguments = Namespace(recipe="auto", epochs=1, batch_size=8, accumulate=accumulate)
    assert str(fitting.warn_of_few_steps(arguments, 240, 30 // accumulate)).endswith(advised)


def test_a_diverged_loss_is_written_as_json():
    from vblora.finetune.language import _perplexity
    from vblora.finetune.task import finite

    results = {"perplexity": _perplexity(800.0), "log": [{"loss": math.nan, "step": 1}], "before": _perplexity(0.0)}
    assert finite(results) == {"perplexity": None, "log": [{"loss": None, "step": 1}], "before": 1.0}


def test_few_steps_are_warned_of(finetune, pairs, tmp_path, capsys):
    assert finetune("--data", pairs, "--epochs", "2", "--recipe", "paper") == 0
    assert re.search(
        r"warning: 14 steps are few: .*Give --epochs 9 for 60 steps, or --batch-size 1", capsys.readouterr().err
    )
    assert results_of(tmp_path / "out")["results"]["warnings"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--label-column", "x"],
            "--label-column is for --task classification and regression, but the task is causal-lm",
        ),
        (["--no-baseline"], "--no-baseline is for --task classification"),
        (["--prompt-column", "promt"], "--prompt-column: .* has no column 'promt'; did you mean 'prompt'"),
        (["--prompt-column", "completion"], "--completion-column: is 'completion', as is --prompt-column"),
        (["--chat-template", "nowhere.jinja"], "--chat-template: nowhere.jinja cannot be read"),
        (["--max-length", "100"], "--max-length: is 100, but this model reads at most 64 tokens"),
        (["--max-length", "4"], "--max-length: none of the .* has anything to learn in its first 4 tokens"),
        (["--target-modules", "lm_head", "--vector-length", "8"], "--target-modules: lm_head is the model's head"),
        (["--resume"], "--resume: there is no checkpoint in"),
        (["--patience", "0"], "argument --patience"),
        (["--max-new-tokens", "64"], "--max-new-tokens: is 64, but this model takes at most 64 tokens"),
        (["--bank", "x", "--lr-bank", "0.1"], "--lr-bank has no effect, because --bank is frozen"),
        (["--resume", "--overwrite"], "--overwrite has no effect"),
        (["--text-column", "prompt", "--loss", "last"], "--loss last has no effect, because the rows are plain texts"),
    ],
)
def test_a_bad_argument_is_refused(finetune, pairs, tmp_path, capsys, options, expected):
    assert finetune("--data", pairs, *options) == 2
    error = capsys.readouterr().err
    assert re.search(expected, error) and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_before_weights_are_read(finetune, pairs, capsys, monkeypatch):
    monkeypatch.setattr("vblora.finetune.models.load_model", None)
    assert finetune("--data", pairs, "--vector-length", "7") == 2
    assert "the adapter does not fit LlamaForCausalLM: --vector-length is 7" in capsys.readouterr().err


def test_a_missing_extra_is_named(finetune, pairs, capsys, monkeypatch):
    from vblora.cli import folders

    monkeypatch.setattr(folders, "find_spec", lambda name: None if name == "trl" else object())
    assert finetune("--data", pairs) == 2
    assert "the package trl is not installed. Install it with: pip install 'vblora[llm]'" in capsys.readouterr().err


def test_a_model_that_mixes_packed_rows_is_refused(base):
    from vblora.errors import CommandError
    from vblora.finetune.language import _refuse_if_packed_rows_mix

    model = load(base, None)
    _refuse_if_packed_rows_mix(model)
    forward = model.model.forward

    def mixing(*args, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    model.model.forward = mixing
    with pytest.raises(CommandError, match="--packing: LlamaForCausalLM does not keep packed rows apart"):
        _refuse_if_packed_rows_mix(model)


def test_a_second_adapter_shares_the_bank_of_the_first(finetune, base, pairs, tmp_path, capsys):
    config = vblora.VBLoRAConfig(r=2, num_vectors=16, vector_length=16, target_modules="all-linear")
    vblora.save(vblora.inject(load(base, None), config), first := tmp_path / "first")
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    short = ["--max-train", "8", "--max-eval", "4"]
    for wrong, expected in (
        (["--topk", "20"], "--topk is 20, but must be at most --num-vectors, 16"),
        (
            ["--vector-length", "8"],
            "has 16 vectors of length 16, but --num-vectors or --vector-length is another number",
        ),
        (["--bank", tmp_path], "is a folder without adapter_model.safetensors"),
        (["--output", first, "--overwrite"], "is also --bank"),
    ):
        assert finetune("--data", pairs, "--bank", first, *wrong) == 2
        printed = capsys.readouterr()
        assert expected in printed.err and not printed.out, printed
    assert finetune("--data", pairs, "--bank", first, *short, "--epochs", "1") == 0
    assert before == {path.name: path.read_bytes() for path in first.iterdir()}
    assert not any("bank" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    prompt = ["--prompt", "who", "--max-new-tokens", "4", "--adapter", tmp_path / "out"]
    capsys.readouterr()
    assert main(["generate", *map(str, prompt)]) == 2
    assert "the folder of the adapter that holds it, as --bank" in capsys.readouterr().err
    assert main(["generate", *map(str, prompt), "--bank", str(first)]) == 0
    assert "warning" not in capsys.readouterr().err

    other = load(base, None)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.add_(0.01)
    shutil.copytree(base, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    assert main(["generate", *map(str, prompt), "--bank", str(first), "--model", str(tmp_path / "other")]) == 0
    assert "layers.1.mlp.down_proj differs" in capsys.readouterr().err
    (tmp_path / "out" / "finetune.json").unlink()
    assert main(["generate", *map(str, prompt), "--bank", str(first), "--model", str(tmp_path / "other")]) == 0
    assert f"was trained with {base}. If {tmp_path / 'other'} is another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("after", "expected"), [(1.9, "whose held-out loss was the lowest"), (2.1, "No epoch lowered")]
)
def test_the_table_says_whether_training_helped(after, expected):
    from rich.console import Console

    from vblora.finetune.report import LanguageResults, print_language_table

    console = Console(record=True, width=400)
    counts = dict.fromkeys(
        ["train_rows", "held_out_rows", "cut_rows", "left_out_rows", "tokens", "steps", "trainable", "stored"], 1
    )
    sizes = {"seconds_per_step": 1.0, "file_bytes": 1, "lora_bytes": 1}
    losses = {"loss_before": 2.0, "loss_after": after, "perplexity_before": 1.0, "perplexity_after": 1.0}
    print_language_table(LanguageResults(**counts, **sizes, **losses, best_epoch=1.0), console)
    assert expected in " ".join(console.export_text().split())
