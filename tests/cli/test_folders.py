"""`vblora info`, `vblora convert` and `vblora merge`: commands that work on folders alone."""

import copy
import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch

import vblora
from tests.finetune.chats import save_gguf
from tests.small_models import bert, gpt2, llama, relative_error
from vblora.checkpoint.folder import METHOD_NAMES
from vblora.cli import main
from vblora.cli.info import sizes_by_part
from vblora.finetune.fingerprints import fingerprint

SIZES = {"r": 2, "num_vectors": 16, "vector_length": 8, "init_vector_bank_bound": 0.5, "num_candidates": 8}
IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
FORMS = ("resume", "deploy", "peft", "peft-topk", "lora")


@torch.no_grad()
def outputs(model):
    return model.eval()(input_ids=IDS).logits


def trained(make, dtype=torch.float32, **choice):
    torch.manual_seed(0)
    base = make().eval().to(dtype)
    model = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES | choice))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.5 if "logits" in name else 0.1)
    return base, model


def run(*arguments):
    return main([str(argument) for argument in arguments])


def fails(capsys, *arguments) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- convert -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", FORMS[:4])
def test_converts_as_save_does(source, form, tmp_path, capsys):
    base, model = trained(bert, modules_to_save=["classifier"], bias="all")
    model.config._name_or_path = "somebody/bert"
    vblora.save(model, tmp_path / "src", form=source)
    if form in ("resume", "peft") and source in ("deploy", "peft-topk"):
        assert "error: --form is" in fails(capsys, "convert", tmp_path / "src", tmp_path / "dst", "--form", form)
        assert not (tmp_path / "dst").exists()
        return
    assert run("convert", tmp_path / "src", tmp_path / "dst", "--form", form) == 0
    assert f"dst: {form}, " in capsys.readouterr().out
    config = json.loads((tmp_path / "dst" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/bert"
    if form == "lora":
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "dst")
    else:
        loaded = vblora.load(copy.deepcopy(base), tmp_path / "dst")
    assert relative_error(outputs(loaded), outputs(model)) < 1e-5
    if source in ("resume", "deploy") and form == source:
        vblora.save(model, tmp_path / "saved", form=form)
        assert files(tmp_path / "saved") == files(tmp_path / "dst")


def test_keeps_what_peft_says_of_the_base_model(tmp_path):
    config = peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, task_type="SEQ_CLS", target_modules=["query"])
    peft.get_peft_model(bert(), config).save_pretrained(tmp_path / "src")
    assert run("convert", tmp_path / "src", tmp_path / "dst", "--form", "lora") == 0
    assert json.loads((tmp_path / "dst" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "dst")
    assert isinstance(loaded, peft.PeftModelForSequenceClassification)


def test_converts_an_adapter_with_a_bank_of_its_own_file(tmp_path, capsys):
    base, first = trained(bert)
    first.vblora.default.bank.save(tmp_path / "bank.safetensors")
    config = vblora.VBLoRAConfig(**SIZES)
    model = vblora.inject(copy.deepcopy(base), config, bank=tmp_path / "bank.safetensors", freeze_bank=True)
    vblora.save(model, tmp_path / "src")
    assert "as --bank." in fails(capsys, "convert", tmp_path / "src", tmp_path / "dst", "--form", "deploy")
    bank = ("--bank", tmp_path / "bank.safetensors")
    assert run("convert", tmp_path / "src", tmp_path / "dst", "--form", "deploy", *bank) == 0
    assert "bank.vectors" not in safetensors.torch.load_file(tmp_path / "dst" / "adapter_model.safetensors")
    assert run("convert", tmp_path / "src", tmp_path / "whole", "--form", "peft", *bank) == 0
    loaded = vblora.load(copy.deepcopy(base), tmp_path / "whole")
    assert torch.equal(outputs(loaded), outputs(model))
    capsys.readouterr()
    assert run("info", tmp_path / "src", *bank) == 0
    whole = capsys.readouterr().out
    assert "bank.safetensors, SHA-256" in whole and "missing" not in whole
    # Without the bank, it says that the bank is missing, and all else.
    assert run("info", tmp_path / "src") == 0
    without = capsys.readouterr().out
    assert [line for line in without.splitlines() if "missing here: give its file" not in line] == whole.splitlines()
    assert len(without.splitlines()) == len(whole.splitlines()) + 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_rounds_the_bank(dtype, tmp_path, capsys):
    _, model = trained(bert)
    vblora.save(model, tmp_path / "src")
    command = ("convert", tmp_path / "src", tmp_path / "dst", "--bank-dtype", dtype, "--form")
    assert "only --form deploy" in fails(capsys, *command, "resume")
    assert run(*command, "deploy") == 0
    vblora.save(model, tmp_path / "saved", form="deploy", bank_dtype=getattr(torch, dtype))
    assert files(tmp_path / "saved") == files(tmp_path / "dst")


def official(directory, model, with_base=True):
    """The adapter of a BERT in the layout of the paper's repository."""
    adapter = model.vblora.default
    sizes = [adapter.r * width // 8 for t in adapter.targets for width in (t.in_features, t.out_features)]
    rows = iter(adapter.logits.detach().split(sizes))
    tensors = {}
    for target in adapter.targets:
        for side in "AB":
            blocks = next(rows).unflatten(0, (adapter.r, -1)).transpose(0, 1)
            tensors[f"{target.name}.logits_{side}"] = blocks.contiguous()
        tensors[f"{target.name}.vector_bank"] = adapter.bank.vectors.detach().clone()
    if with_base:
        tensors |= {name: t.clone() for name, t in vblora.eject(copy.deepcopy(model)).state_dict().items()}
        tensors |= {f"classifier.{name}": t.clone() for name, t in model.classifier.state_dict().items()}
    directory.mkdir()
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "bert", "topk": 2, "rank": 2}))


def test_reads_the_papers_repository(tmp_path, capsys):
    base, model = trained(bert, modules_to_save=["classifier"], num_candidates=None)
    src = tmp_path / "src"
    official(src, model)
    assert run("convert", src, tmp_path / "dst", "--form", "resume") == 0
    loaded = vblora.load(copy.deepcopy(base), tmp_path / "dst", is_trainable=True)
    assert torch.equal(outputs(loaded), outputs(model))
    assert "paper's repository" in fails(capsys, "convert", src, tmp_path / "x", "--form", "peft", "--bank", src / "b")

    (src / "config.json").unlink()
    file = src / "model.safetensors"
    assert "Give that as --topk" in fails(capsys, "convert", file, tmp_path / "x", "--form", "peft")
    assert run("convert", file, tmp_path / "peft", "--form", "peft", "--topk", "2") == 0
    assert torch.equal(outputs(vblora.load(copy.deepcopy(base), tmp_path / "peft")), outputs(model))
    file.rename(src / "pytorch_model.bin")
    for path in (src, src / "pytorch_model.bin"):
        assert "save_file" in fails(capsys, "convert", path, tmp_path / "x", "--form", "peft", "--topk", "2")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(name) for name in list(t) if "vector_bank" in name], "no tensor `<layer>.vector_bank`"),
        (lambda t: [t.pop(name) for name in list(t) if "logits" in name], "no tensor `<layer>.logits_A`"),
        (lambda t: t.pop("bert.encoder.layer.1.attention.self.query.logits_B"), "1.attention.self.query.logits_B`"),
        (lambda t: t["bert.encoder.layer.1.attention.self.query.vector_bank"].add_(1), "all layers share one"),
        (lambda t: t["bert.encoder.layer.1.attention.self.query.logits_B"].mul_(float("nan")), "NaN"),
    ],
)
def test_refuses_a_damaged_checkpoint_of_the_papers_repository(change, message, tmp_path, capsys):
    official(tmp_path / "src", trained(bert, num_candidates=None)[1], with_base=False)
    tensors = safetensors.torch.load_file(tmp_path / "src" / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "src" / "model.safetensors")
    assert message in fails(capsys, "convert", tmp_path / "src", tmp_path / "dst", "--form", "deploy")
    assert not (tmp_path / "dst").exists()


def test_says_what_is_wrong_with_folders(tmp_path, capsys):
    plain, model = trained(bert)
    vblora.save(model, tmp_path / "src")
    shutil.copytree(tmp_path / "src", tmp_path / "own" / "kept")
    plain.save_pretrained(base := tmp_path / "own" / "base")
    (tmp_path / "own" / "x.gguf").touch()
    before = files(tmp_path / "src")
    (tmp_path / "file").write_text("x")
    for command, message in {
        ("convert", tmp_path / "none", tmp_path / "dst"): "SRC: there is no",
        (
            "convert",
            tmp_path / "src",
            tmp_path / "src",
        ): "DST: the folder .* is not empty. Give another one, or --overwrite",
        ("convert", tmp_path / "src", tmp_path / "file"): "DST: .* is a file",
        (
            "convert",
            tmp_path / "src",
            tmp_path / "dst",
            "--topk",
            "2",
        ): "--topk: applies only to a checkpoint of the paper's",
        ("convert", tmp_path, tmp_path / "dst"): "SRC: .* sub-folders `src`",
        ("convert", tmp_path / "src", tmp_path / "src", "--overwrite"): "DST: .* is also SRC, which would be lost",
        (
            "convert",
            tmp_path / "src",
            tmp_path / "own",
            *("--bank", tmp_path / "own" / ".." / "own", "--overwrite"),
        ): "DST: .* is also --bank, which would be lost",
        ("convert", base, tmp_path / "dst"): "SRC: .* neither an adapter nor a checkpoint of the paper's",
        ("convert", tmp_path / "src", tmp_path / "dst", "--bank", tmp_path / "file"): "--bank: .* damaged",
        ("info", tmp_path / "none"): "FOLDER: there is no folder",
        ("info", tmp_path): "FOLDER: .* sub-folders `src`",
        ("merge", tmp_path / "none", tmp_path / "src", tmp_path / "dst"): "BASE: there is no folder",
        ("merge", tmp_path / "src", base, tmp_path / "dst"): "ADAPTER: .* holds a model, not an adapter",
        (
            "merge",
            tmp_path / "src",
            tmp_path / "src",
            tmp_path / "dst",
        ): "BASE: .* is the folder of an adapter: give the base",
        ("merge", tmp_path / "own", tmp_path / "src", tmp_path / "dst"): "BASE: .* Give a .gguf file in it: .*x.gguf",
        ("merge", tmp_path / "src", tmp_path / "src", tmp_path / "src"): "OUT: the folder .* is not empty",
        ("merge", tmp_path / "src", tmp_path / "none", tmp_path / "dst"): "ADAPTER: there is no folder",
    }.items():
        form = ("--form", "deploy") * (command[0] == "convert")
        assert re.search(message, fails(capsys, *command, *form)), message
    assert not (tmp_path / "dst").exists()
    assert files(tmp_path / "src") == before
    shutil.copytree(tmp_path / "src", tmp_path / "dst")
    assert run("convert", tmp_path / "src", tmp_path / "dst", "--form", "deploy", "--overwrite") == 0
    wrong_form = fails(capsys, "convert", tmp_path / "dst", tmp_path / "x", "--form", "peft")
    assert "--form peft-topk holds what inference needs" in wrong_form


def test_git_lfs_pointers_are_named(tmp_path, capsys):
    base, model = trained(bert)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    vblora.save(model, tmp_path / "src", form="peft")
    for file in ("src/adapter_model.safetensors", "src/adapter_config.json", "base/model.safetensors.index.json"):
        before = (tmp_path / file).read_bytes()
        (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        printed = fails(capsys, "merge", tmp_path / "base", tmp_path / "src", tmp_path / "dst")
        assert f"{tmp_path / file} is a Git LFS pointer" in printed and "git lfs pull" in printed
        (tmp_path / file).write_bytes(before)
    for file in (tmp_path / "base").glob("model-*.safetensors"):
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    printed = fails(capsys, "merge", tmp_path / "base", tmp_path / "src", tmp_path / "dst")
    assert re.search(r"model-\S+ is a Git LFS pointer", printed)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_files_may_start_with_a_byte_order_mark(encoding, tmp_path, capsys):
    base, model = trained(bert)
    base.save_pretrained(tmp_path / "base")
    vblora.save(model, tmp_path / "src", form="peft")
    for file in ("base/config.json", "src/adapter_config.json"):
        (tmp_path / file).write_text((tmp_path / file).read_text(), encoding=encoding)
    assert run("merge", tmp_path / "base", tmp_path / "src", tmp_path / "dst") == 0
    assert "weights updated" in capsys.readouterr().out


def test_out_may_be_a_link_but_not_a_mount_point(tmp_path, capsys, monkeypatch):
    base, model = trained(bert)
    base.save_pretrained(tmp_path / "base")
    vblora.save(model, tmp_path / "src")
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda _: True)
        assert "out is where a file system is mounted" in fails(
            capsys, "merge", tmp_path / "base", tmp_path / "src", tmp_path / "out"
        )
    assert run("merge", tmp_path / "base", tmp_path / "src", tmp_path / "out") == 0
    assert (tmp_path / "real" / "model.safetensors").exists() and (tmp_path / "out").is_symlink()


# --- info --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_info(form, tmp_path, capsys):
    _, model = trained(bert, modules_to_save=["classifier"], seed=3)
    vblora.save(model, tmp_path, form=form)
    torch.save({}, tmp_path / "optimizer.pt")
    assert run("info", tmp_path) == 0
    printed = capsys.readouterr().out
    sizes = sizes_by_part(tmp_path)
    assert sum(sizes.values()) == sum(
        (tmp_path / name).stat().st_size
        for name in ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt")
    )
    assert (
        sizes["factors" if form == "lora" else "vector bank"] == (4 * 2 * (32 + 32) if form == "lora" else 16 * 8) * 4
    )
    assert sizes["extra: biases, modules_to_save"] == (2 * 32 + 2) * 4
    rows = model.vblora.default.num_subvectors
    if form == "peft":
        assert sizes["logits"] == rows * 16 * 4
    if form == "peft-topk":
        assert (sizes["indices"], sizes["weights"]) == (rows * 2, rows * 4)
    if form == "deploy":
        assert (sizes["indices"], sizes["weights"]) == (rows, rows * 2 * 4)
    assert form == "lora" or f"{sizes['vector bank']:,} bytes" in printed
    assert "attention.self.query (32 -> 32)" in printed
    shown = {
        "resume": "resume",
        "deploy": "deploy",
        "peft": "all logits",
        "peft-topk": "save_only",
        "lora": "2106.09685",
    }
    assert shown[form] in printed


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (vblora.LoraConfig(r=2), {"factors": 4 * 2 * 64}),
        (vblora.VeraConfig(r=8), {"projections": 8 * 64, "vectors": 4 * (8 + 32)}),
        (vblora.TiedLoraConfig(r=2), {"projections": 2 * 64, "vectors": 4 * (2 + 32)}),
    ],
    ids=["lora", "vera", "tied_lora"],
)
@pytest.mark.parametrize("form", ["resume", "peft"])
def test_info_merge_and_convert_of_other_methods(config, parts, form, tmp_path, capsys):
    torch.manual_seed(0)
    base = bert().eval()
    base.save_pretrained(tmp_path / "base")
    model = vblora.inject(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in model.vblora.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    if form == "peft" and config.method == "tied_lora":
        form = "lora"
        parts = {"factors": 4 * 2 * 64}
    vblora.save(model, tmp_path / "src", form=form)
    assert run("info", tmp_path / "src") == 0
    printed = capsys.readouterr().out
    assert METHOD_NAMES["lora" if form == "lora" else config.method] in printed
    sizes = sizes_by_part(tmp_path / "src")
    assert {part: sizes[part] for part in parts} == {part: 4 * count for part, count in parts.items()}
    assert sizes.keys() - parts.keys() == {"names and description"}
    if form == "peft" and config.method == "vera":  # which does not say how wide the inputs are
        for command, last in (("merge", ()), ("convert", ("--form", "lora"))):
            source = (tmp_path / "base", tmp_path / "src") if command == "merge" else (tmp_path / "src",)
            assert "do not hold the widths" in fails(capsys, command, *source, tmp_path / "dst", *last)
        assert not (tmp_path / "dst").exists()
        return
    assert run("convert", tmp_path / "src", tmp_path / "dst", "--form", "lora") == 0
    assert relative_error(outputs(vblora.load(copy.deepcopy(base), tmp_path / "dst")), outputs(model)) < 1e-5
    assert run("merge", tmp_path / "base", tmp_path / "src", tmp_path / "merged") == 0
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    assert relative_error(outputs(merged), outputs(model)) < 1e-5


# --- merge -------------------------------------------------------------------------------------------------------------------

MERGES = [
    (bert, {"modules_to_save": ["classifier"], "bias": "all"}),
    (llama, {"target_modules": "all-linear"}),
    (gpt2, {"target_modules": ["c_attn", "c_proj"], "bias": "vblora_only"}),  # attn.c_proj is square
    (llama, {"target_modules": "all-linear", "vector_length": 24, "pad": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["resume", "peft-topk"])
@pytest.mark.parametrize(("make", "choice"), MERGES)
def test_merges_as_the_model_does(make, choice, form, dtype, tmp_path, capsys):
    form = "deploy" if choice.get("pad") and form == "peft-topk" else form  # PEFT's forms cut nothing
    base, model = trained(make, dtype, **choice)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB" if form == "resume" else "1GB")
    shards = len(list((tmp_path / "base").glob("*.safetensors")))
    assert (shards > 2) == (form == "resume")
    (tmp_path / "base" / "tokenizer").mkdir()
    (tmp_path / "base" / "tokenizer" / "words.txt").write_text("a b")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "linked.txt").write_text("c")
    (tmp_path / "base" / "linked").symlink_to(tmp_path / "words")
    (tmp_path / "base" / "openvino").mkdir()
    others = {"pytorch_model.bin", "openvino/openvino_model.bin", "adapter_config.json"}
    for other in others:
        (tmp_path / "base" / other).write_text("what it was")
    for file in ("checkpoint-20/model.safetensors", "checkpoint-20/config.json"):  # a Trainer's
        others.add(file)
        (tmp_path / "base" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / file).write_text("what it was")
    vblora.save(model, tmp_path / "adapter", form=form)
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert (
        f"{len(model.vblora.default.targets)} weights updated" in printed
        and "or another adapter: adapter_config.json, checkpoint-20, openvino/openvino_model.bin, pytorch_model.bin."
        in printed
    )

    vblora.load(wanted := copy.deepcopy(base), tmp_path / "adapter")
    vblora.merge(wanted, release=True)
    vblora.eject(wanted)
    merged = type(base).from_pretrained(tmp_path / "out", dtype=dtype)
    assert merged.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(merged.state_dict()[name], tensor) for name, tensor in wanted.state_dict().items())
    # In bfloat16 they differ before any merge: transformers keeps a buffer in float32, .to() does not.
    if dtype == torch.float32:
        assert torch.equal(outputs(merged), outputs(wanted))
        assert not torch.equal(outputs(merged), outputs(base))
    was, now = files(tmp_path / "base"), files(tmp_path / "out")
    was = {name: data for name, data in was.items() if name not in others} | {"linked/linked.txt": b"c"}
    assert was.keys() == now.keys()
    assert all(was[name] == now[name] for name in was if not name.endswith(".safetensors"))


def test_merges_into_a_checkpoint_of_other_prefixes(tmp_path, capsys):
    base, model = trained(llama, target_modules="all-linear")
    base.model.save_pretrained(tmp_path / "bare")
    vblora.save(model, tmp_path / "adapter")
    assert run("merge", tmp_path / "bare", tmp_path / "adapter", tmp_path / "out") == 0
    vblora.merge(model)
    merged = type(base.model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(merged(IDS).last_hidden_state, model.model(IDS).last_hidden_state)

    torch.manual_seed(0)
    inner = vblora.inject(llama().model, vblora.VBLoRAConfig(**SIZES, target_modules=["q_proj"]))
    vblora.save(inner, tmp_path / "inner")
    base.save_pretrained(tmp_path / "whole")
    assert run("merge", tmp_path / "whole", tmp_path / "inner", tmp_path / "out2") == 0
    with torch.no_grad():
        vblora.merge(inner)
        merged = type(base).from_pretrained(tmp_path / "out2").model.eval()
        assert torch.equal(merged(IDS).last_hidden_state, inner.eval()(IDS).last_hidden_state)


def test_merges_what_is_tied(tmp_path):
    choice = {"modules_to_save": ["lm_head", "embed_tokens"]}
    base, model = trained(lambda: llama(tie_word_embeddings=True), **choice)
    base.save_pretrained(tmp_path / "base")
    vblora.save(model, tmp_path / "adapter")
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    vblora.merge(model)
    assert torch.equal(outputs(type(base).from_pretrained(tmp_path / "out")), outputs(model))


@pytest.mark.parametrize("choice", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_refuses_to_merge_one_of_two_that_are_tied(choice, tmp_path, capsys):
    base, model = trained(lambda: llama(tie_word_embeddings=True, vocab_size=56), **choice)
    base.save_pretrained(tmp_path / "base")
    vblora.save(model, tmp_path / "adapter")
    assert "`tie_word_embeddings`" in fails(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_a_merged_model_has_the_labels_and_the_chat_template_that_were_trained(tmp_path, capsys):
    """Not those of the base model, which may have another order."""
    base, model = trained(bert, modules_to_save=["classifier"])
    base.config.id2label = {0: "POSITIVE", 1: "NEGATIVE"}
    base.save_pretrained(tmp_path / "base")
    vblora.save(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "finetune.json").write_text(json.dumps({"labels": ["NEGATIVE", "POSITIVE"]}))
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    merged = type(base).from_pretrained(tmp_path / "out")
    assert merged.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    assert merged.config.label2id == {"NEGATIVE": 0, "POSITIVE": 1}
    report = {"scores": {"mean": 3.0, "deviation": 0.5}, "chat_template": "auto"}
    (tmp_path / "adapter" / "finetune.json").write_text(json.dumps(report))
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "scores") == 0
    assert "score = output * 0.5 + 3.0" in capsys.readouterr().out
    assert not (tmp_path / "scores" / "chat_template.jinja").exists()
    (tmp_path / "base" / "chat_template.jinja").write_text("of the base")
    (tmp_path / "adapter" / "finetune.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "chat") == 0
    assert (tmp_path / "chat" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "The chat template is the one that the adapter was trained with." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stated", "config", "expected"),
    [
        ({"eos_token_id": 2, "top_p": 0.5, "_from_model_config": True}, {}, {"eos_token_id": [2, 5, 7], "top_p": 0.5}),
        ({"eos_token_id": [7, 2, 5]}, {}, {"eos_token_id": [7, 2, 5]}),
        (None, {"bos_token_id": 1, "eos_token_id": 2}, {"bos_token_id": 1, "eos_token_id": [2, 5, 7]}),
    ],
)
def test_a_merged_model_stops_where_its_adapter_was_trained_to_end(stated, config, expected, tmp_path):
    base, model = trained(bert)
    base.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (tmp_path / "base" / "generation_config.json").unlink(missing_ok=True)
    if stated is not None:
        (tmp_path / "base" / "generation_config.json").write_text(json.dumps(stated))
    vblora.save(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "finetune.json").write_text(json.dumps({"ends": [5, 7]}))
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: written[name] for name in written if name != "pad_token_id"} == expected


def test_merge_says_that_the_base_model_is_another(tmp_path, capsys):
    base, model = trained(bert)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    vblora.save(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "finetune.json").write_text(json.dumps({"fingerprint": fingerprint(base)}))
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    assert "warning" not in capsys.readouterr().err
    with torch.no_grad():
        base.bert.embeddings.word_embeddings.weight.mul_(1.1)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "other") == 0
    assert "(among others embeddings.word_embeddings differs)" in capsys.readouterr().err


def test_refuses_links_that_lead_nowhere_or_back(tmp_path, capsys):
    base, model = trained(bert)
    base.save_pretrained(tmp_path / "base")
    vblora.save(model, tmp_path / "adapter")
    for link, message in {
        tmp_path / "none": "none, which is missing",
        tmp_path / "base": "a folder that it is in",
    }.items():
        (tmp_path / "base" / "link").symlink_to(link)
        assert message in fails(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        (tmp_path / "base" / "link").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def change_base(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
REFUSED = {
    "no such layer": (lambda t: t.pop(QUERY), f"no tensor `{QUERY}`"),
    "two such layers": (
        lambda t: [t.update({f"{x}.{QUERY}": t[QUERY].clone()}) for x in "ab"] + [t.pop(QUERY)],
        f"`{QUERY}` may be any of the base model's `a.{QUERY}`, `b.{QUERY}`",
    ),
    "another width": (lambda t: t.update({QUERY: torch.ones(32, 16)}), f"`{QUERY}` is (32, 16)"),
    "quantised": (lambda t: t.update({QUERY: torch.ones(32, 32, dtype=torch.int8)}), f"`{QUERY}` is I8"),
    "no head": (lambda t: [t.pop(f"classifier.{x}") for x in ("weight", "bias")], "no tensor `classifier."),
    "another head": (lambda t: t.update({"classifier.weight": torch.ones(3, 32)}), "`classifier.weight` is (3, 32)"),
    "too large": (lambda t: t.update({QUERY: torch.full((32, 32), float("inf"))}), f"`{QUERY}` would not be finite"),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_refuses_a_base_model_that_does_not_fit(damage, tmp_path, capsys):
    change, message = REFUSED[damage]
    base, model = trained(bert, modules_to_save=["classifier"])
    base.save_pretrained(tmp_path / "base")
    vblora.save(model, tmp_path / "adapter")
    change_base(tmp_path / "base", change)
    before = files(tmp_path)
    assert message in fails(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert files(tmp_path) == before


def test_refuses_damaged_shards(tmp_path, capsys):
    base, model = trained(bert)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    vblora.save(model, tmp_path / "adapter")
    command = ("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    index, shard = tmp_path / "base" / "model.safetensors.index.json", min((tmp_path / "base").glob("*.safetensors"))
    shutil.copyfile(shard, tmp_path / "whole")
    shard.write_bytes(shard.read_bytes()[:-9])
    assert "is damaged" in fails(capsys, *command)
    shard.unlink()
    assert f"{shard} is missing" in fails(capsys, *command)
    index.write_text(index.read_text().replace(shard.name, "../whole"))
    assert "not a file of the same folder" in fails(capsys, *command)
    index.write_text("{}")
    assert "no `weight_map`" in fails(capsys, *command)
    assert not (tmp_path / "out").exists()


def test_a_merge_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch, capsys):
    base, model = trained(bert)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    vblora.save(model, tmp_path / "adapter")
    from vblora.checkpoint import merge_files as shards

    whole, count = shards._write_shard, iter(range(3))

    def fails_later(*arguments):
        if next(count) == 2:
            raise OSError("disk full")
        whole(*arguments)

    monkeypatch.setattr(shards, "_write_shard", fails_later)
    before = files(tmp_path)
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 1
    assert "cannot be written: disk full" in capsys.readouterr().err
    assert files(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_merges_into_a_gguf_file(tmp_path, capsys):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vblora.finetune.models import load_model

    base = save_gguf(tmp_path / "base.gguf")
    _, model = trained(
        lambda: load_model(AutoModelForCausalLM, str(base), "model", dtype=torch.float32), target_modules="all-linear"
    )
    vblora.save(model, tmp_path / "adapter")
    assert run("info", tmp_path / "adapter") == 0
    assert str(base.name) in capsys.readouterr().out  # what `merge` takes, and not the folder
    with vblora.disabled(model):
        trained_with = fingerprint(model)
    for name, given, warned in (("same", trained_with, False), ("out", dict.fromkeys(trained_with, "other"), True)):
        report = {"fingerprint": given, "chat_template": "{{ messages }}", "ends": [3]}
        (tmp_path / "adapter" / "finetune.json").write_text(json.dumps(report))
        assert run("merge", base, tmp_path / "adapter", tmp_path / name) == 0
        said = capsys.readouterr()
        assert "7 weights updated" in said.out
        assert ("are not those that the adapter was trained with" in said.err) == warned
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = IDS % 28
    with torch.no_grad():
        assert relative_error(merged(ids).logits, model.eval()(ids).logits) < 1e-5
        with vblora.disabled(model):
            assert relative_error(merged(ids).logits, model(ids).logits) > 1e-3
    tokenizers = (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=base.name),
    )
    assert len({str(tokenizer("abc?").input_ids) for tokenizer in tokenizers}) == 1
    assert tokenizers[0].chat_template == "{{ messages }}"
    assert merged.generation_config.eos_token_id == [0, 3]
    (tmp_path / "b").mkdir()
    vblora.save(trained(bert)[1], tmp_path / "other")
    before = sorted(tmp_path.iterdir())
    assert run("merge", base, tmp_path / "other", tmp_path / "b") == 2
    assert "ADAPTER does not fit BASE" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before and not list((tmp_path / "b").iterdir())


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    _, model = trained(bert)
    vblora.save(model, tmp_path / "src")

    def full(path):
        raise OSError(27, "File too large", str(path))

    monkeypatch.setattr("vblora.files.sync", full)  # when files were written under temporary names
    before = files(tmp_path)
    assert run("convert", tmp_path / "src", tmp_path / "dst", "--form", "deploy") == 1
    error = capsys.readouterr().err
    assert "DST: " in error and "File too large" in error and error.count("\n") == 1
    assert files(tmp_path) == before and not (tmp_path / "dst").exists()
    for command in (
        ["convert", tmp_path / "src", "/proc/abc", "--form", "deploy"],
        ["merge", tmp_path, "x", "/proc/abc"],
    ):
        assert "/proc/abc cannot be created or written to: check /proc (" in fails(capsys, *command)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device"), 1),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), 1),  # torch.save on a full disk
        (safetensors.SafetensorError("Error while serializing: I/O error: No space left (os error 28)"), 1),
        (RuntimeError("a fault of ours"), None),
    ],
)
def test_a_failed_file_is_one_line_whoever_raises_it(error, code, tmp_path, monkeypatch, capsys):
    from vblora.cli import info

    def fail(*_):
        raise error

    monkeypatch.setattr(info, "read_adapter", fail)
    if code is None:
        with pytest.raises(RuntimeError, match="of ours"):
            run("info", tmp_path)
        return
    assert run("info", tmp_path) == code
    printed = capsys.readouterr().err
    assert printed.startswith("vblora info: error: ") and printed.count("\n") == 1
