"""`vblora generate`: prompts in, completions out."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import vblora
from tests.finetune.chats import TEMPLATE, make_chats, make_tokenizer, save_model, write_jsonl
from vblora.cli import main

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROMPTS = ["what is good cat ?", "who", "what is the bad film ?", "hello"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"))


def load(base: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> Path:
    """A folder of two adapters that change what the model says."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate({"one": 2, "two": 3}.items()):
        config = vblora.VBLoRAConfig(r=rank, num_vectors=16, vector_length=16, target_modules="all-linear", seed=seed)
        torch.manual_seed(seed)
        model = vblora.inject(load(base), config)
        with torch.no_grad():
            model.vblora.default.bank.vectors.normal_()
        vblora.save(model, folder / name)
    return folder


def completion(base: Path, adapter: Path | None, prompt: str, chat: bool = True) -> str:
    """By the plain model, one prompt at a time."""
    tokenizer = make_tokenizer()
    model = load(base)
    if adapter is not None:
        vblora.load(model, adapter)
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) if chat else prompt
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def generate(base, *arguments) -> int:
    fixed = ["--model", base, "--max-new-tokens", "6", "--precision", "float32", "--batch-size", "3"]
    return main(["generate", *map(str, [*fixed, *arguments])])


def test_prompts_as_arguments(base, adapters, capsys):
    options = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    for adapter in (None, adapters / "one"):
        assert generate(base, *options, *([] if adapter is None else ["--adapter", adapter])) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert rows == [{"prompt": prompt, "generated": completion(base, adapter, prompt)} for prompt in PROMPTS]
    assert generate(base, "--prompt", PROMPTS[0], "--chat-template", "none") == 0
    assert capsys.readouterr().out.splitlines() == [completion(base, None, PROMPTS[0], chat=False)]


def test_given_tokens_end_a_completion(base):
    from vblora.finetune.generation import complete

    tokenizer, model = make_tokenizer(), load(base)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    options = {"max_new_tokens": 6}
    whole = complete(model, tokenizer, prompts, **options)
    words = whole[0].split()
    end = tokenizer.convert_tokens_to_ids(words[1])
    ended = complete(model, tokenizer, prompts, ends=[end], **options)[0].split()
    assert ended == words[: words.index(words[1]) + 1] and len(ended) < len(words)


def test_the_most_likely_token_is_not_penalised(base):
    """Whatever the base model's generation_config.json says, except where a text ends."""
    from vblora.finetune.generation import complete

    tokenizer, model = make_tokenizer(), load(base)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    whole = complete(model, tokenizer, prompts, max_new_tokens=6)
    first, second = tokenizer.convert_tokens_to_ids(whole[0].split()[:2])
    stated = model.generation_config
    stated.suppress_tokens, stated.repetition_penalty, stated.no_repeat_ngram_size = [first], 5.0, 1
    assert complete(model, tokenizer, prompts, max_new_tokens=6) == whole
    assert model.generation_config is stated
    stated.eos_token_id = second
    assert len(complete(model, tokenizer, prompts, max_new_tokens=6)[0].split()) < len(whole[0].split())


def test_a_table_whose_rows_have_adapters_of_their_own(base, adapters, tmp_path):
    names = ["one", "two", "", "two"]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "Ask", "WHO"], *zip(range(4), PROMPTS, names, strict=True)])
    out = tmp_path / "out.csv"
    options = ["--adapter", adapters, "--adapter-column", "who", "--prompt-column", "ask", "--output", out]
    assert generate(base, "--data", path, *options) == 0
    rows = list(csv.DictReader(out.open(newline="")))
    assert [row["id"] for row in rows] == ["0", "1", "2", "3"]
    expected = [completion(base, adapters / name if name else None, p) for name, p in zip(names, PROMPTS, strict=True)]
    assert [row["generated"] for row in rows] == expected
    assert len({completion(base, adapters / name, PROMPTS[0]) for name in ("one", "two")}) == 2


def test_an_adapter_for_the_other_command_is_refused(adapters, tmp_path, capsys):
    table = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    adapter = adapters / "one"
    for about, command, expected in (
        ({"task": "causal-lm"}, ["predict", "--data", table], "is a language model's adapter. Use vblora generate."),
        ({"task": "regression"}, ["generate", "--prompt", "a"], "is a classifier's adapter. Use vblora predict."),
    ):
        (adapter / "finetune.json").write_text(json.dumps(about))
        try:
            assert main([str(word) for word in [*command, "--adapter", adapter]]) == 2
        finally:
            (adapter / "finetune.json").unlink()
        assert expected in capsys.readouterr().err


def test_an_adapter_knows_its_base_and_its_template(base, adapters, tmp_path, capsys):
    adapter = adapters / "two"
    (adapter / "finetune.json").write_text(json.dumps({"model": str(base), "chat_template": "none"}))
    try:
        options = ["--adapter", adapter, "--prompt", "who", "--max-new-tokens", "6", "--precision", "float32"]
        assert main(["generate", *map(str, options)]) == 0
        assert capsys.readouterr().out.strip() == completion(base, adapter, "who", chat=False)
        # A project that has moved: the config still leads to the model. Where it does not, the error says who named the model.
        (adapter / "finetune.json").write_text(json.dumps({"model": str(tmp_path / "old"), "chat_template": "none"}))
        assert main(["generate", *map(str, options)]) == 0
        assert capsys.readouterr().out.strip() == completion(base, adapter, "who", chat=False)
        lost = shutil.copytree(adapter, tmp_path / "lost")
        (lost / "adapter_config.json").write_text("{}")
        assert main(["generate", "--adapter", str(lost), "--prompt", "who"]) == 2
        assert f"The adapter in {lost} names this base model; --model gives" in capsys.readouterr().err
        template = tmp_path / "template.jinja"
        template.write_text(TEMPLATE)
        assert main(["generate", *map(str, options), "--chat-template", str(template)]) == 0
        assert capsys.readouterr().out.strip() == completion(base, adapter, "who")
        # What it knows goes with it into another form, and counts for no other adapter.
        options[1] = tmp_path / "converted"
        assert main(["convert", str(adapter), str(options[1]), "--form", "deploy"]) == 0
        capsys.readouterr()
        assert main(["generate", *map(str, options)]) == 0
        assert capsys.readouterr().out.strip() == completion(base, adapter, "who", chat=False)
        shutil.copy(adapter / "adapter_model.safetensors", options[1])
        assert main(["generate", *map(str, options)]) == 2
        assert "has changed since vblora finetune wrote finetune.json" in capsys.readouterr().err
        assert main(["convert", str(adapters / "one"), str(options[1]), "--form", "deploy", "--overwrite"]) == 0
        assert not (options[1] / "finetune.json").exists()
    finally:
        (adapter / "finetune.json").unlink()


def test_a_chat_that_ends_with_the_assistant_is_completed_as_in_training(base, tmp_path, capsys):
    chat = make_chats(1)[0]["messages"]  # user, assistant, user, assistant
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat}, {"messages": chat[:1]}, {"messages": chat[:2]}])
    assert generate(base, "--data", path, "--output", tmp_path / "out.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["generated"] for row in rows] == [completion(base, None, chat[0]["content"])] * 3
    assert rows[0]["messages"] == chat
    told = capsys.readouterr().err
    assert told.count("the chat ends with the assistant") == 1 and "line 1" in told
    path = write_jsonl(tmp_path / "asked.jsonl", [{"messages": chat[:3]}])
    assert generate(base, "--data", path, "--output", tmp_path / "asked.csv") == 0
    assert "the chat ends" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--prompt or --data: give one of them"),
        (["--prompt", "a", "--data", "x"], "--prompt or --data: give one of them"),
        (["--prompt", "a", "--adapter", "."], "--adapter: . is neither the folder of an adapter"),
        (["--prompt", "a", "--adapter", "ADAPTERS"], "--adapter: there are 2 adapters: 'one', 'two'. Give the folder of one"),
        (
            ["--data", "ROWS", "--adapter", "ADAPTERS", "--adapter-column", "who", "--bank", "nowhere"],
            "--bank: nowhere is missing",
        ),
        (["--prompt", "a", "--adapter", "nowhere"], "--adapter: there is no folder nowhere"),
        (["--prompt", "a", "--output", "x.txt"], "x.txt is unknown; its name must end in .csv, .tsv, .jsonl.\n"),
        (["--prompt", "a", "--num-beams", "2", "--temperature", "1"], "beam search does not sample. Give one"),
        (["--data", "ROWS", "--prompt-column", "x"], "line 1: there is no column 'x', only 'prompt', 'who'"),
        (
            ["--data", "ROWS", "--adapter", "ADAPTERS", "--adapter-column", "who"],
            "there is no adapter 'three'; --adapter gives 'one', 'two'",
        ),
        (["--prompt", "a", "--top-p", "0"], "argument --top-p"),
        (["--prompt", "a", "--top-p", "0.5"], "--top-p has no effect, because --temperature is 0"),
        (["--prompt", "a", "--prompt-column", "b"], "--prompt-column has no effect"),
        (["--prompt", "a", "--bank", "b"], "--bank has no effect"),
        (["--prompt", "a", "--overwrite"], "--overwrite has no effect"),
        (["--prompt", "", "--chat-template", "none"], "--prompt '': the prompt has no tokens"),
        (["--prompt", "a", "--max-new-tokens", "64"], "--max-new-tokens: is 64, but this model takes at most 64 tokens"),
        (["--prompt", "a " * 55], "--prompt 'a a a"),
        (["--data", "LONG"], "line 2: the prompt has 65 tokens, but the model has room for at most 58"),
        (["--data", "OTHERS", "--output", "out.csv"], "some rows have the column 'id' and others do not"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_refused(base, adapters, tmp_path, capsys, monkeypatch, options, expected):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "who": "three"}])
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a"}, {"prompt": "a " * 60}])
    others = write_jsonl(tmp_path / "others.jsonl", [{"prompt": "a"}, {"prompt": "a", "id": 1}])
    monkeypatch.setattr("vblora.finetune.generating.complete", None)  # nothing is generated
    words = {"ADAPTERS": adapters, "ROWS": rows, "LONG": long, "OTHERS": others}
    options = [words.get(option, option) for option in options]
    assert generate(base, *options) == 2
    error = capsys.readouterr().err
    assert re.search(re.escape(expected), error) and error.count("\n") == 1, error
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "long.jsonl", "others.jsonl"}
