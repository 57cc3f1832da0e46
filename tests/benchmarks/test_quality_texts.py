"""Language models in `python -m benchmarks.quality`: E2E and chats as they are read, and the loss, texts and scores of a run."""

import csv
import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.quality import __main__ as quality
from benchmarks.quality import chats, language_models
from benchmarks.quality.language_models import Settings
from benchmarks.quality.methods import LANGUAGE_RECIPES
from benchmarks.quality.texts import Pair, Prompt, TextTask, make_chats, read_e2e

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A random Llama that reads bytes."""
    folder = tmp_path_factory.mktemp("llama")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*letters, "<end>"])}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=257, num_key_value_heads=2, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_e2e(folder, meanings: int = 108) -> None:
    """Two sentences a meaning; those of the test set have others."""
    for name, start, count in (("devset", 0, meanings), ("testset_w_refs", 500, 4)):
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["mr", "ref"])
            for i in range(start, start + count):
                writer.writerows([[f"name[{i}]", f"It is {i}."], [f"name[{i}]", f"{i},\nit is."]])


def test_e2e_is_split_by_meaning(tmp_path):
    write_e2e(tmp_path)
    task, other = (read_e2e(tmp_path, held_out=held_out) for held_out in (False, True))
    assert task.train == other.train and len(task.train) == 16  # 8 meanings, 100 held out
    trained, held_out, tested = ({pair.prompt for pair in pairs} for pairs in (task.train, other.dev, task.dev))
    assert len(held_out) == 100 and not trained & held_out
    assert tested == {f"Restaurant: name[{i}]\nDescription:" for i in range(500, 504)}
    assert task.prompts[0] == Prompt("Restaurant: name[500]\nDescription:", ("It is 500.", "500, it is."))
    assert Pair("Restaurant: name[503]\nDescription:", " 503, it is.") in task.dev
    assert {prompt.text for prompt in other.prompts} == held_out


def test_rows_are_drawn_from_all_and_are_the_same_each_time(tmp_path):
    write_e2e(tmp_path, 300)
    task = read_e2e(tmp_path, max_train=40, max_dev=3, max_prompts=2)
    assert [len(part) for part in task.data] == [40, 3, 2] and task == read_e2e(tmp_path, 40, 3, 2)
    assert len({pair.prompt for pair in task.train}) > 30
    assert not read_e2e(tmp_path, max_prompts=0).prompts


def test_files_that_are_not_e2es_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data: there is no .*devset\.csv. Give the folder"):
        read_e2e(tmp_path)
    (tmp_path / "devset.csv").write_text("a,b\nc,d\n")
    with pytest.raises(ValueError, match=r"devset\.csv has the columns a, b"):
        read_e2e(tmp_path)
    write_e2e(tmp_path, 100)
    with pytest.raises(ValueError, match="has 100 meaning representations; 100 are held out"):
        read_e2e(tmp_path)


def test_chats_are_made_the_same_each_time_and_are_all_different():
    task, other = make_chats(max_train=500), make_chats(max_train=500, held_out=True)
    assert task == make_chats(max_train=500) and task.train == other.train and not task.prompts
    parts = [set(map(repr, pairs)) for pairs in (make_chats().train, task.dev, other.dev)]
    assert [len(part) for part in parts] == [6000, 400, 400] and len(set.union(*parts)) == 6800
    assert {len(pair.prompt) for pair in task.train} == {1, 3}  # the user has the last turn


def test_chats_answers_are_right():
    for *_, ask, answer in chats.make(2000):
        if ask.startswith("Sort"):
            words = ask.split(": ")[1].split(", ")
            assert answer.endswith(", ".join(sorted(words, reverse="reverse" in ask)))
        if "How many" in ask:
            left, right = answer.split(",")[0].split(" = ")
            first, sign, second = left.split()
            assert int(first) + int(second) * (1 if sign == "+" else -1) == int(right) >= 0
        if "JSON" in ask:
            assert all(str(value) in ask for value in json.loads(answer).values())


def make_pairs(count: int) -> list[Pair]:
    rng = random.Random(0)
    return [Pair(f"{'a' * rng.randint(1, 20)}:", f" {'bc' * rng.randint(1, 9)}") for _ in range(count)]


def test_the_loss_is_that_of_completions_alone(tiny_llama):
    settings = Settings(tiny_llama, False, batch_size=3)
    tokenizer, model = language_models._load(tiny_llama)
    pairs = [*make_pairs(14), Pair(("hello", "you", "who?"), "me")]
    losses = []
    for pair in pairs:  # one by one, without padding
        prompt = (
            pair.prompt
            if isinstance(pair.prompt, str)
            else "<user>hello<end><assistant>you<end><user>who?<end><assistant>"
        )
        before, after = (
            tokenizer(prompt)["input_ids"],
            [*tokenizer(pair.completion)["input_ids"], tokenizer.eos_token_id],
        )
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(after), reduction="none"))
    assert len({len(part) for part in losses}) > 3
    reached = language_models._loss(model, language_models._Rows(pairs, tokenizer), settings)
    assert reached == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_prompts_of_any_length_are_completed_as_one_by_one(tiny_llama):
    settings = Settings(tiny_llama, False, batch_size=1, max_new_tokens=12)
    tokenizer, model = language_models._load(tiny_llama)
    prompts = [pair.prompt for pair in make_pairs(11)]
    expected = []
    for prompt in prompts:
        ids, made = tokenizer(prompt)["input_ids"], []
        while len(made) < 12 and (not made or made[-1] not in (tokenizer.eos_token_id, *tokenizer("\n")["input_ids"])):
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(made, skip_special_tokens=True).strip().split("\n")[0].strip())
    assert language_models._complete(model, prompts, 1, settings, tokenizer) == expected
    assert len(set(expected)) > 3
    assert len(language_models._complete(model, prompts, 3, settings, tokenizer)) == 11


def test_texts_are_compared_with_all_references():
    prompts = [
        Prompt("", ("the cat sat on the mat", "a cat was sitting on a mat")),
        Prompt("", ("dogs bark at the moon all night long",)),
    ]
    right = language_models._compare(["a cat was sitting on a mat", "dogs bark at the moon all night long"], prompts)
    assert right == pytest.approx({"BLEU": 100, "chrF": 100, "ROUGE-L": 100})
    half = language_models._compare(["the cat sat on the mat", "nothing of it"], prompts)
    assert half["ROUGE-L"] == pytest.approx(50) and half["BLEU"] < 70 and half["chrF"] < 80
    swapped = language_models._compare(["dogs bark at the moon all night long", "the cat sat on the mat"], prompts)
    assert swapped["BLEU"] < 10


def test_examples_go_before_the_prompt():
    task = TextTask("t", [Pair("in:", " out"), Pair("in2:", " out2")], [], [])
    assert sorted(language_models._shots(task, 2, 0).split("\n\n")) == ["", "in2: out2", "in: out"]
    assert language_models._shots(task, 0, 0) == ""
    seeded = [name for name, recipe in LANGUAGE_RECIPES.items() if recipe.has_seeds]
    assert seeded == [name for name in LANGUAGE_RECIPES if name != "frozen"]


def test_a_language_model_learns_and_describes(tiny_llama, tmp_path, monkeypatch, capsys):
    write_e2e(tmp_path)
    output = tmp_path / "out" / "runs.jsonl"
    methods = ["frozen, 3 examples", "VB-LoRA", "VB-LoRA, int8 bank", "VB-LoRA, frozen bank"]
    options = ["--methods", *methods, "--seeds", "1", "--steps", "60", "--beams", "1", "2"]
    fits = ["--set", "vector_length=16", "num_vectors=24", "lr_bank=0.02", "init_vector_bank_bound=0.5"]
    paths = ["--data", str(tmp_path), "--model", str(tiny_llama), "--output", str(output), "--processes", "1"]
    monkeypatch.setattr("sys.argv", ["quality", "--suite", "e2e", *options, *paths, *fits, "--precision", "float32"])
    assert quality.main() == 0
    frozen, adapted, rounded, shared = (json.loads(line)["result"] for line in output.read_text().splitlines())
    assert adapted["scores"]["loss"] < 0.6 * frozen["scores"]["loss"]
    assert adapted["losses"][-1] < 0.8 * adapted["losses"][0] and frozen["losses"] == []
    assert frozen["stored"] == 0 < adapted["stored"]
    assert shared["stored"] == 2 * 34 * 32 * 1.25  # of 34 sub-vectors a layer and rank, a weight and a byte of index
    assert shared["losses"][-1] < shared["losses"][0]
    assert rounded["bytes"] == 24 * (16 + 4) + 2 * 34 * 8 * (4 + 5 / 8)  # a byte a value and a scale a vector; r is 8
    assert shared["bytes"] == 2 * 34 * 32 * (4 + 5 / 8)  # weights, and indices of 5 bits
    table = capsys.readouterr().out.splitlines()
    columns = [f"{metric}{beams}" for beams in ("", ", 2 beams") for metric in ("BLEU", "chrF", "ROUGE-L")]
    assert table[0] == f"|  | stored | bytes | seeds | loss | {' | '.join(columns)} | seconds |"
    assert table[2].startswith(f"| frozen, 3 examples | 0 | 0 | 1 | {frozen['scores']['loss']:.4f} |")
    assert table[2].endswith("| – |")
    assert f"| {adapted['scores']['loss']:.4f} |" in table[3]
    assert table[-1] == "Steps of 8 rows: 60 on E2E. Computed in float32."
