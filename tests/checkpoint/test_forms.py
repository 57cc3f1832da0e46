"""What each form of a folder brings back: all of the outputs, all of the training, or a bank that others share."""

import copy
import itertools
import os
import shutil
import signal
import sys
import warnings

import pytest
import safetensors.torch
import torch

import vblora
from tests.sentences import batches, encoder
from tests.small_models import Net, bert
from vblora import files
from vblora.adapters import Target
from vblora.adapters.vblora_rows import Deployed, Trained, draw_rows
from vblora.checkpoint import folder, native, packing
from vblora.checkpoint.vblora import VBLoRAContents

IDS = torch.randint(3, 50, (2, 7))
SIZES = {"r": 2, "num_vectors": 24, "vector_length": 8, "init_vector_bank_bound": 1.0}


def trained(seed=0, bank=None, seed_of_logits=None, **choice):
    torch.manual_seed(seed)
    model = bert().eval()
    config = vblora.VBLoRAConfig(**SIZES | choice, seed=seed_of_logits)
    vblora.inject(model, config, bank=bank, freeze_bank=bank is not None)
    logits = model.vblora.default.logits
    with torch.no_grad():
        touched = torch.randint(0, logits.shape[1] + 1, (len(logits), 1))
        logits += torch.randn_like(logits) * (torch.arange(logits.shape[1]) < touched)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter is not logits:
                parameter.add_(torch.randn_like(parameter))
    return model


def loaded(path, **how):
    torch.manual_seed(0)
    return vblora.load(bert().eval(), path, **how)


# A shared bank


@pytest.mark.parametrize(("form", "dtype"), [("resume", None), ("deploy", torch.int8), ("peft", None), ("lora", None)])
def test_the_bank_of_an_adapter_is_a_bank_for_others(tmp_path, form, dtype):
    first = trained()
    vblora.save(first, tmp_path / "first", form=form, bank_dtype=dtype)
    if form == "lora":
        with pytest.raises(ValueError, match="first has no vector bank of its own"):
            vblora.VectorBank.from_file(tmp_path / "first")
        return
    bank = vblora.VectorBank.from_file(tmp_path / "first")
    sha256 = first.vblora.default.bank.save(tmp_path / "bank.safetensors", dtype)
    assert bank.file.sha256 == sha256 and bank.file.name == "first"
    assert torch.equal(bank.vectors, vblora.VectorBank.from_file(tmp_path / "bank.safetensors").vectors)
    inside = vblora.VectorBank.from_file(tmp_path / "first" / "adapter_model.safetensors")
    assert inside.file == bank.file and torch.equal(inside.vectors, bank.vectors)

    second = trained(seed_of_logits=1, bank=tmp_path / "first")
    vblora.save(second, tmp_path / "second")
    assert not any("bank" in name for name in safetensors.torch.load_file(tmp_path / "second" / folder.TENSORS_FILE))
    for given in (tmp_path / "first", tmp_path / "bank.safetensors"):
        assert torch.equal(loaded(tmp_path / "second", bank=given)(IDS).logits, second(IDS).logits)
    with pytest.raises(ValueError, match="second has no vector bank of its own"):
        vblora.VectorBank.from_file(tmp_path / "second")
    with pytest.raises(FileNotFoundError, match="is a folder without adapter_model"):
        vblora.VectorBank.from_file(tmp_path)

    vblora.save(trained(seed=2), tmp_path / "first", form="resume")
    with pytest.raises(ValueError, match="but `bank` is first, SHA-256"):
        loaded(tmp_path / "second", bank=tmp_path / "first")


# Packing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_prefixes_come_back_to_the_bit(dtype):
    initial = torch.randn(9000, 7).to(dtype)
    lengths = torch.randint(0, 8, (9000, 1))
    values = torch.where(torch.arange(7) < lengths, torch.randn(9000, 7).to(dtype), initial)
    values[0, 6], initial[0, 6] = 0.0, -0.0  # a difference that == does not see
    values[1, 2] = float("nan")
    packed = packing.pack_prefixes(values, initial)
    assert packed[0][0] == 7 and (packed[0][2:] <= lengths[2:, 0]).all()
    back = packing.unpack_prefixes(*packed, initial.clone())
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(back.view(bits), values.view(bits))
    zero = packing.pack_prefixes(torch.zeros(3, 5))
    assert zero[0].tolist() == [0, 0, 0] and zero[1].numel() == 0
    assert packing.pack_prefixes(torch.zeros(0, 5))[0].shape == (0,)


@pytest.mark.parametrize("bits", [1, 2, 7, 8, 11, 16, 17])
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_bits_come_back(bits, count):
    integers = torch.randint(0, 2**bits, (count,))
    packed = packing.pack_bits(integers, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
    assert torch.equal(packing.unpack_bits(packed, bits, count), integers)


def test_bits_are_packed_low_bits_first():
    assert packing.pack_bits(torch.tensor([1, 2, 3, 4]), 3).tolist() == [0b11_010_001, 0b100_0]


# Deploy


@pytest.mark.parametrize("topk", range(1, 9))
@pytest.mark.parametrize("num_candidates", [None, 12])
def test_a_deployed_adapter_gives_the_same_bits(topk, num_candidates, tmp_path):
    model = trained(topk=topk, num_candidates=num_candidates)
    with torch.no_grad():
        model.vblora.default.logits *= 30  # sharp: most weights are tiny
    vblora.save(model, tmp_path, form="deploy")
    other = loaded(tmp_path)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert other.vblora.default.logits is None and not any(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match="no parameter to train"):
        vblora.parameter_groups(other)
    assert vblora.count_parameters(other).stored == vblora.count_parameters(model).stored
    vblora.save(other, tmp_path / "again")  # deploy, as it has no logits
    assert (tmp_path / "again" / folder.TENSORS_FILE).read_bytes() == (tmp_path / folder.TENSORS_FILE).read_bytes()
    weights = safetensors.torch.load_file(tmp_path / folder.TENSORS_FILE)["weights"]
    assert weights.shape[1] == topk  # all of them: none is made up from the others
    if topk > 1:
        assert (weights > 0).any() and weights.min() < 1e-10


def test_topk_of_a_deployed_adapter_cannot_change(tmp_path):
    base = Net(blocks=1)
    config = vblora.VBLoRAConfig(num_vectors=16, vector_length=8, target_modules=["up"])
    vblora.save(vblora.inject(copy.deepcopy(base), config), tmp_path, form="deploy")
    model = vblora.load(base, tmp_path)
    model.vblora.default.topk = 1
    for call in (lambda: model(torch.randn(2, 16)), lambda: vblora.save(model, tmp_path), lambda: vblora.merge(model)):
        with pytest.raises(ValueError, match="`topk` is 1, but must stay 2: this adapter is deployed"):
            call()


def test_a_deployed_adapter_runs_under_autocast_compile_merge_and_eject(tmp_path):
    model = trained()
    vblora.save(model, tmp_path, form="deploy")
    other = loaded(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(other(IDS).logits, model(IDS).logits)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)
    ours, theirs = (vblora.merge(m)(IDS).logits for m in (model, other))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float32, 0.0), (torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.int8, 0.5 / 127)],
)
def test_bank_dtypes(dtype, error, tmp_path):
    model = trained()
    vblora.save(model, tmp_path, form="deploy", bank_dtype=dtype)
    exact, bank = model.vblora.default.bank.vectors, loaded(tmp_path).vblora.default.bank.vectors
    assert bank.dtype == torch.float32
    largest = exact.abs().amax(1, keepdim=True) if dtype == torch.int8 else exact.abs()
    assert ((bank - exact).abs() <= error * largest * (1 + 1e-5)).all()
    stored = safetensors.torch.load_file(tmp_path / folder.TENSORS_FILE)["bank.vectors"]
    assert stored.dtype == dtype


def test_a_bank_of_zeros_and_one_beyond_float16(tmp_path):
    model = trained()
    with torch.no_grad():
        model.vblora.default.bank.vectors[3] = 0
    vblora.save(model, tmp_path, form="deploy", bank_dtype=torch.int8)
    assert (loaded(tmp_path).vblora.default.bank.vectors[3] == 0).all()
    with torch.no_grad():
        model.vblora.default.bank.vectors[3] = 1e6
    before = (tmp_path / folder.TENSORS_FILE).read_bytes()
    with pytest.raises(ValueError, match=r"`bank_dtype` is torch.float16, in which .* infinite"):
        vblora.save(model, tmp_path, form="deploy", bank_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"`bank_dtype` is torch.int32; allowed"):
        vblora.save(model, tmp_path, form="deploy", bank_dtype=torch.int32)
    with pytest.raises(ValueError, match=r"`dtype` is torch.int32; allowed"):
        model.vblora.default.bank.save(tmp_path / "bank.safetensors", torch.int32)
    with pytest.raises(ValueError, match="keeps the bank"):
        vblora.save(model, tmp_path, form="resume", bank_dtype=torch.int8)
    with pytest.raises(ValueError, match="`form` is 'x'"):
        vblora.save(model, tmp_path, form="x")
    assert (tmp_path / folder.TENSORS_FILE).read_bytes() == before


def test_a_row_without_a_finite_logit_is_refused(tmp_path):
    model = trained()
    with torch.no_grad():
        model.vblora.default.logits[5] = float("-inf")
    with pytest.raises(ValueError, match="row 5 of `logits` has nothing finite"):
        vblora.save(model, tmp_path / "a", form="deploy")
    assert not (tmp_path / "a").exists()


def test_a_deployed_adapter_does_not_train_unless_told_how(tmp_path):
    model = trained(topk=3)
    vblora.save(model, tmp_path, form="deploy")
    with pytest.raises(ValueError, match=r'form="resume".*train_kept=True'):
        loaded(tmp_path, is_trainable=True)
    other = loaded(tmp_path, is_trainable=True, train_kept=True)
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits)
    assert other.vblora.default.logits.shape == (other.vblora.default.num_subvectors, 3)
    optimizer = torch.optim.AdamW(vblora.parameter_groups(other))
    before = other.vblora.default.logits.detach().clone()
    other(IDS).logits.square().sum().backward()
    optimizer.step()
    assert not torch.equal(other.vblora.default.logits, before)
    with pytest.raises(ValueError, match="no seed"):
        vblora.grow(other, 5)
    with pytest.raises(ValueError, match="without logits to train"):
        vblora.save(loaded(tmp_path), tmp_path / "x", form="resume")
    assert not (tmp_path / "x").exists()


def test_weights_that_are_no_softmax_do_not_train(tmp_path):
    vblora.save(trained(topk=3), tmp_path, form="deploy")
    path = tmp_path / folder.TENSORS_FILE
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(tensors | {"weights": -tensors["weights"]}, path, metadata)
    assert loaded(tmp_path)(IDS).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: some of its weights are negative"):
        loaded(tmp_path, train_kept=True)


def test_loading_over_an_adapter_of_another_form_is_refused(tmp_path):
    model = trained()
    vblora.save(model, tmp_path, form="deploy")
    before = model.vblora.default.logits.detach().clone()
    with pytest.raises(
        ValueError, match=r"it is deployed, but the adapter in `model` can train\. Eject that adapter first"
    ):
        vblora.load(model, tmp_path)
    assert torch.equal(model.vblora.default.logits, before)
    other = loaded(tmp_path)
    vblora.load(other, tmp_path)  # the same form


# Resume


def step(model, optimizer, batch):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("num_candidates", [None, 32])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_resumed_run_is_the_uninterrupted_one(name, num_candidates, tmp_path):
    config = vblora.VBLoRAConfig(
        r=4,
        num_vectors=256,
        vector_length=64,
        num_candidates=num_candidates,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )

    def optimizer_of(model):
        groups = vblora.parameter_groups(model)
        return torch.optim.AdamW(groups) if name == "AdamW" else torch.optim.SGD(groups, momentum=0.9)

    torch.manual_seed(0)
    model = vblora.inject(encoder(), config)
    optimizer = optimizer_of(model)
    data = batches()
    for batch in data[:12]:
        step(model, optimizer, batch)
    vblora.save(model, tmp_path)
    torch.save(vblora.pack_optimizer(model, optimizer), tmp_path / "optimizer.pt")
    uninterrupted = [step(model, optimizer, batch) for batch in data[12:24]]

    other = vblora.load(encoder(), tmp_path, is_trainable=True)
    restored = optimizer_of(other)
    vblora.unpack_optimizer(other, restored, torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert [step(other, restored, batch) for batch in data[12:24]] == uninterrupted
    for ours, theirs in zip(other.vblora.default.rows, model.vblora.default.rows, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert torch.equal(other.vblora.default.bank.vectors, model.vblora.default.bank.vectors)
    assert torch.equal(other.classifier.weight, model.classifier.weight)
    assert other.vblora.default.seed is not None
    # and little was stored for it
    stored = safetensors.torch.load_file(tmp_path / folder.TENSORS_FILE)
    assert stored["logits.values"].numel() < 0.2 * model.vblora.default.logits.numel()
    packed = torch.load(tmp_path / "optimizer.pt", weights_only=True)["state"]
    sizes = [x["values"].numel() for state in packed.values() for x in state.values() if isinstance(x, dict)]
    assert len(sizes) == (2 if name == "AdamW" else 1)
    assert max(sizes) < 0.2 * model.vblora.default.logits.numel()


def test_exhausted_rows_stay_exhausted(tmp_path):
    model = trained(num_candidates=8)
    model.vblora.default.exhausted[[0, 3]] = True
    vblora.save(model, tmp_path)
    assert torch.equal(loaded(tmp_path).vblora.default.exhausted, model.vblora.default.exhausted)
    other = trained(num_candidates=8, seed_of_logits=1)
    vblora.load(other, tmp_path)
    assert vblora.stats(other).exhausted == 2
    assert other.vblora.default.seed == model.vblora.default.seed
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_growing_survives_a_file(tmp_path):
    model = trained(num_candidates=8)
    vblora.grow(model, 12)
    vblora.save(model, tmp_path)
    other = loaded(tmp_path, is_trainable=True)
    vblora.grow(model, 20)
    vblora.grow(other, 20)
    assert torch.equal(other.vblora.default.logits, model.vblora.default.logits)
    vblora.grow(model, 24)  # all: still with candidates, in their order
    vblora.save(model, tmp_path)
    assert torch.equal(loaded(tmp_path)(IDS).logits, model(IDS).logits)


def test_another_number_of_candidates_is_refused(tmp_path):
    vblora.save(trained(num_candidates=8), tmp_path)
    with pytest.raises(ValueError, match="it has 8 logits per row, but the adapter in `model` has 9"):
        vblora.load(trained(num_candidates=9), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapters_of_other_dtypes_come_back_as_they_are(dtype, tmp_path):
    model = trained(num_candidates=8).to(dtype)
    vblora.save(model, tmp_path)
    torch.manual_seed(0)
    other = vblora.load(bert().eval().to(dtype), tmp_path)
    assert other.vblora.default.logits.dtype == dtype
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    vblora.save(model, tmp_path / "deploy", form="deploy")
    torch.manual_seed(0)
    deployed = vblora.load(bert().eval().to(dtype), tmp_path / "deploy")
    torch.testing.assert_close(deployed(IDS).logits, model(IDS).logits)


def test_the_same_adapter_is_the_same_bytes(tmp_path):
    for form in ("resume", "deploy", "peft", "lora"):
        for name in ("a", "b"):
            vblora.save(trained(num_candidates=8, bias="all"), tmp_path / form / name, form=form)
        a, b = (tmp_path / form / name / folder.TENSORS_FILE for name in ("a", "b"))
        assert a.read_bytes() == b.read_bytes()


def test_rows_follow_their_layers_by_name():
    config = vblora.VBLoRAConfig(r=1, num_vectors=5, vector_length=2)
    targets = (Target("a", 4, 2), Target("b", 2, 6))
    rows = Deployed(torch.arange(7)[:, None].repeat(1, 2) % 5, torch.rand(7, 2))
    contents = VBLoRAContents(config, targets, torch.ones(5, 2), rows)
    turned = contents.in_order(targets[::-1])
    order = [3, 4, 5, 6, 0, 1, 2]
    assert torch.equal(turned.rows.weights, rows.weights[order])
    assert turned.targets == targets[::-1]
    seeded = VBLoRAContents(config, targets, torch.ones(5, 2), draw_rows([2, 1, 1, 3], 5, None, seed=1, std=0.1))
    assert seeded.in_order(targets[::-1]).rows.seed is None  # row 0 is not the seed's row 0 any more
    assert isinstance(seeded.in_order(targets).rows, Trained) and seeded.in_order(targets).rows.seed == 1
    with pytest.raises(ValueError, match="`c` is a target in the model, but not in the file"):
        contents.in_order((*targets, Target("c", 2, 2)))
    with pytest.raises(ValueError, match="`b` is 2 -> 6 there, 2 -> 8 here"):
        contents.in_order((targets[0], Target("b", 2, 8)))


# A bank of its own


def test_adapters_share_a_bank_file(tmp_path):
    bank_file = tmp_path / "bank.safetensors"
    sha256 = trained().vblora.default.bank.save(bank_file)
    models = [trained(seed=seed, bank=bank_file) for seed in (1, 2)]
    for number, model in enumerate(models):
        assert not model.vblora.default.bank.vectors.requires_grad and model.vblora.default.logits.requires_grad
        for form in ("resume", "deploy"):
            vblora.save(model, tmp_path / f"{form}{number}", form=form)
            stored = safetensors.torch.load_file(tmp_path / f"{form}{number}" / folder.TENSORS_FILE)
            assert not [name for name in stored if name.startswith("bank")]
    bank = vblora.VectorBank.from_file(bank_file)
    assert bank.file.sha256 == sha256
    for form in ("resume", "deploy"):
        others = [
            vblora.load(copy.deepcopy(model_before), tmp_path / f"{form}{number}", bank=bank)
            for number, model_before in enumerate(bases())
        ]
        assert others[0].vblora.default.bank is others[1].vblora.default.bank is bank  # one in memory
        for other, model in zip(others, models, strict=True):
            assert torch.equal(other(IDS).logits, model(IDS).logits)
    trainable = vblora.load(bases()[0], tmp_path / "resume0", bank=bank_file, is_trainable=True)
    assert trainable.vblora.default.logits.requires_grad and not trainable.vblora.default.bank.vectors.requires_grad
    vblora.load(trainable, tmp_path / "resume0")  # over it: the bank is there


def test_an_adapter_saved_after_its_bank_names_the_file_until_the_bank_changes(tmp_path):
    model = trained()
    bank = model.vblora.default.bank

    def has_a_bank_of_its_own():
        vblora.save(model, tmp_path / "a")
        stored = safetensors.torch.load_file(tmp_path / "a" / folder.TENSORS_FILE)
        return "bank.vectors" in stored

    bank.save(tmp_path / "rounded.safetensors", torch.int8)
    assert has_a_bank_of_its_own()
    bank.save(tmp_path / "bank.safetensors")
    assert not has_a_bank_of_its_own()
    other = loaded(tmp_path / "a", bank=tmp_path / "bank.safetensors")
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    with torch.no_grad():
        bank.vectors[0, 0] += 1
    assert has_a_bank_of_its_own()


def test_an_adapter_loaded_over_one_of_another_bank_file_brings_its_bank(tmp_path):
    for seed in (0, 5):
        model = trained(seed=seed)
        model.vblora.default.bank.save(tmp_path / f"bank{seed}.safetensors")
        vblora.save(model, tmp_path / f"a{seed}")
    present = loaded(tmp_path / "a0", bank=tmp_path / "bank0.safetensors")
    vblora.load(present, tmp_path / "a5", bank=tmp_path / "bank5.safetensors")
    fresh = loaded(tmp_path / "a5", bank=tmp_path / "bank5.safetensors")
    assert torch.equal(present.vblora.default.bank.vectors, model.vblora.default.bank.vectors)
    assert torch.equal(present(IDS).logits, fresh(IDS).logits)


def bases():
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(bert().eval())
    return made


def test_a_wrong_or_missing_bank_is_refused_by_name(tmp_path):
    bank_file = tmp_path / "bank.safetensors"
    sha256 = trained().vblora.default.bank.save(bank_file)
    other_file = tmp_path / "other.safetensors"
    trained(seed=5).vblora.default.bank.save(other_file)
    model = trained(bank=bank_file)
    vblora.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match=f"`bank.safetensors`, SHA-256 {sha256}. Pass that as `bank`"):
        loaded(tmp_path / "a")
    with pytest.raises(ValueError, match=f"{sha256}, but `bank` is other.safetensors"):
        loaded(tmp_path / "a", bank=other_file)
    with pytest.raises(ValueError, match="was not read from a file"):
        loaded(tmp_path / "a", bank=vblora.VectorBank(24, 8))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        loaded(tmp_path / "a", bank=tmp_path / "nowhere")
    changed = vblora.VectorBank.from_file(bank_file)
    with torch.no_grad():
        changed.vectors[0, 0] += 1
    with pytest.raises(ValueError, match="not what its file"):
        loaded(tmp_path / "a", bank=changed)
    vblora.save(trained(), tmp_path / "own")
    with pytest.raises(ValueError, match="a bank of its own, but `bank` was given"):
        loaded(tmp_path / "own", bank=bank_file)
    with torch.no_grad():  # once it has changed it is not the file's any more, and goes into the folder
        model.vblora.default.bank.vectors[0, 0] += 1
    vblora.save(model, tmp_path / "b")
    assert torch.equal(loaded(tmp_path / "b")(IDS).logits, model(IDS).logits)


def test_files_that_are_no_bank_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    for tensors, message in (
        ({"weight": torch.ones(2, 2)}, "its tensors are `weight`"),
        ({"vectors": torch.ones(2)}, r"\(2,\), but must be \(h, b\)"),
        ({"vectors": torch.ones(2, 2).int()}, "int32"),
        ({"vectors": torch.ones(2, 2) / 0}, "infinite"),
        ({"vectors": torch.ones(2, 2), "scales": torch.ones(2)}, "with `scales`"),
        ({"vectors": torch.ones(2, 2, dtype=torch.int8), "scales": torch.ones(3)}, "must be float32 of shape"),
    ):
        safetensors.torch.save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            vblora.VectorBank.from_file(path)
    vblora.VectorBank(3, 8).save(path)
    with pytest.raises(ValueError, match="`bank` has 3 vectors"):
        vblora.inject(bert(), vblora.VBLoRAConfig(**SIZES), bank=path)


# Being killed


@pytest.mark.skipif(sys.platform != "linux", reason="os.fork")
def test_a_killed_save_leaves_the_old_folder_or_the_new_one(tmp_path):
    old, new = trained(num_candidates=8, bias="all"), trained(seed=1, num_candidates=8, bias="all", topk=3)
    target = tmp_path / "adapter"
    outputs = {}
    for name, model in (("old", old), ("new", new)):
        vblora.save(model, tmp_path / name)
        outputs[name] = loaded(tmp_path / name)(IDS).logits

    def traced(see):
        """Saves, and calls `see` at each line of ours that runs, with its place."""

        def trace(frame, event, _):
            if frame.f_code.co_filename not in (files.__file__, folder.__file__, native.__file__):
                return None
            if event == "line":
                see((frame.f_code.co_name, frame.f_code.co_filename, frame.f_lineno))
            return trace

        shutil.rmtree(target, ignore_errors=True)
        vblora.save(old, target)
        before = sys.gettrace()
        sys.settrace(trace)
        vblora.save(new, target)
        sys.settrace(before)

    def save_and_die_at(moment):
        """In a child: saves, and is killed when so many lines have run. Returns whether it was."""
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            count = itertools.count()
            traced(lambda _: next(count) == moment and os.kill(os.getpid(), signal.SIGKILL))
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    ran = []
    traced(ran.append)
    # All moments of writing files; before that, each line once, since loops over tensors only run the same code again.
    writing = ("write_files", "sync")
    moments = [moment for moment, (name, *_) in enumerate(ran) if name in writing or ran[moment] not in ran[:moment]]
    results = []
    for moment in [*moments, len(ran)]:
        assert save_and_die_at(moment) == (moment < len(ran))
        with warnings.catch_warnings():  # the two files may differ, of which one counts
            warnings.simplefilter("ignore")
            after = loaded(target)(IDS).logits
        results.append("new" if torch.equal(after, outputs["new"]) else "old")
        assert results[-1] == "new" or torch.equal(after, outputs["old"]), ran[moment:][:1]
    assert len(results) > 50
    assert results == sorted(results, key=["old", "new"].index)  # old up to some line, new from there on
    assert {"old", "new"} == set(results)


def test_what_was_read_does_not_change_with_its_file(tmp_path):
    """Nor does a file that is cut short end the process, as it would a map of the file."""
    path = tmp_path / "bank.safetensors"
    vblora.VectorBank(64, 32).save(path)
    bank = vblora.VectorBank.from_file(path)
    before = bank.vectors.clone()
    with open(path, "r+b") as file:
        file.seek(-64 * 32 * 4, os.SEEK_END)
        file.write(bytes(64 * 32 * 4))
    assert torch.equal(bank.vectors, before) and bank.unchanged()
    os.truncate(path, 100)
    assert torch.equal(bank.vectors, before)
