"""PEFT's files, read and written, with peft itself on the other side; and the faults of its own handling of them."""

import copy
import json
import warnings

import peft
import pytest
import safetensors.torch
import torch

import vblora
from tests.small_models import bert, gpt2, llama, relative_error
from vblora.checkpoint import folder
from vblora.checkpoint.folder import CONFIG_FILE, TENSORS_FILE

SIZES = {"r": 2, "num_vectors": 16, "vector_length": 8, "init_vector_bank_bound": 0.5}
IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
ROUNDING = 1e-5  # and what the models make of it
BANK = "base_model.vblora_vector_bank"
HEAD = {"modules_to_save": ["classifier", "pooler"]}
CASES = [
    (bert, {}),
    (bert, HEAD | {"bias": "vblora_only", "target_modules": ["query", "intermediate.dense"]}),
    (bert, {"modules_to_save": ["classifier"], "bias": "all", "target_modules": ["query", "key", "value", "dense"]}),
    (llama, {"target_modules": "all-linear", "topk": 3}),
    (llama, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "exclude_modules": ["v_proj"]}),
    (gpt2, {"target_modules": "all-linear"}),
    (gpt2, {"target_modules": ["c_attn"], "bias": "all", "topk": 1}),
]
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def shaken(model):
    """With what trains moved away from where it started."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.5 if "logits" in name else 0.1)
    return model


def ours(make, **choice):
    torch.manual_seed(0)
    base = make().eval()
    return base, shaken(vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES | choice)))


def theirs(make, **choice):
    torch.manual_seed(0)
    base = make().eval()
    return base, shaken(peft.get_peft_model(copy.deepcopy(base), peft.VBLoRAConfig(**SIZES | choice))).eval()


def from_peft(base, directory, **choice):
    """What PEFT makes of a folder; it must be content with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), directory, **choice).eval()


@torch.no_grad()
def outputs(model):
    return model.eval()(input_ids=IDS).logits


def change(directory, make_change, config=None):
    path = directory / TENSORS_FILE
    tensors = safetensors.torch.load_file(path)
    make_change(tensors)
    safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, path, {"format": "pt"})
    if config:
        values = json.loads((directory / CONFIG_FILE).read_text()) | config
        (directory / CONFIG_FILE).write_text(json.dumps(values))


@pytest.mark.parametrize("num_candidates", [None, 6])
@pytest.mark.parametrize("form", ["peft", "peft-topk"])
@pytest.mark.parametrize(("make", "choice"), CASES)
def test_peft_computes_the_same_from_our_files(make, choice, form, num_candidates, tmp_path):
    base, model = ours(make, num_candidates=num_candidates, **choice)
    vblora.save(model, tmp_path, form=form)
    loaded = from_peft(base, tmp_path)
    assert relative_error(outputs(loaded), outputs(model)) < ROUNDING
    assert relative_error(outputs(base), outputs(model)) > 1e-3
    again = vblora.load(copy.deepcopy(base), tmp_path)
    assert relative_error(outputs(again), outputs(model)) < ROUNDING
    if form == "peft":
        assert torch.equal(outputs(again), outputs(model))
    known = set(peft.VBLoRAConfig().to_dict())
    assert set(json.loads((tmp_path / CONFIG_FILE).read_text())) <= known


@pytest.mark.parametrize("form", ["peft", "peft-topk"])
@pytest.mark.parametrize("num_vectors", [16, 300])  # indices of 8 and of 16 bits
def test_our_files_are_as_pefts(form, num_vectors, tmp_path):
    base, model = ours(gpt2, num_vectors=num_vectors, bias="vblora_only", topk=3)
    vblora.save(model, tmp_path / "ours", form=form)
    from_peft(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    one, other = (safetensors.torch.load_file(tmp_path / name / TENSORS_FILE) for name in ("ours", "theirs"))
    assert {n: (t.shape, t.dtype) for n, t in one.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    one, other = (json.loads((tmp_path / name / CONFIG_FILE).read_text()) for name in ("ours", "theirs"))
    own = {"target_modules", "peft_version", "base_model_name_or_path"}
    assert {name: one[name] for name in one.keys() - own} == {name: other[name] for name in other.keys() - own}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("make", "choice"), CASES)
def test_we_compute_the_same_from_pefts_files(make, choice, compact, tmp_path):
    base, model = theirs(make, save_only_topk_weights=compact, **choice)
    model.save_pretrained(tmp_path)
    loaded = vblora.load(copy.deepcopy(base), tmp_path)
    assert relative_error(outputs(loaded), outputs(model)) < ROUNDING
    assert relative_error(outputs(base), outputs(model)) > 1e-3
    assert (loaded.vblora.default.logits is None) == compact
    vblora.eject(loaded)
    assert torch.equal(outputs(loaded), outputs(base))


def test_a_classifiers_head_need_not_have_both_of_pefts_names(tmp_path):
    base, model = theirs(bert, task_type="SEQ_CLS", bias="all")
    model.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / CONFIG_FILE).read_text())["modules_to_save"]) == {"classifier", "score"}
    loaded = vblora.load(copy.deepcopy(base), tmp_path)
    assert relative_error(outputs(loaded), outputs(model)) < ROUNDING
    change(tmp_path, lambda t: [t.pop(name) for name in list(t) if "classifier" in name])
    with pytest.raises(ValueError, match="`modules_to_save` names `classifier`"):
        vblora.load(copy.deepcopy(base), tmp_path)


def test_a_resized_vocabulary_comes_along(tmp_path):
    base, model = theirs(llama)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    model.get_input_embeddings().weight.data.add_(1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = vblora.load(copy.deepcopy(base), tmp_path)
    assert relative_error(outputs(loaded), outputs(model)) < ROUNDING


def test_layers_of_short_names_are_not_taken_for_others(tmp_path):
    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(16, 16)
            self.inner = torch.nn.Sequential()
            self.inner.add_module("up", torch.nn.Linear(16, 16))

        def forward(self, x):
            return self.inner(self.up(x))

    base = Nested()
    model = shaken(vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES, target_modules="up")))
    for form in ("peft", "peft-topk", "lora"):
        vblora.save(model, tmp_path / form, form=form)
        loaded = from_peft(base, tmp_path / form)
        assert loaded.base_model.targeted_module_names == ["up"]
        x = torch.randn(3, 16)
        assert relative_error(loaded(x), model(x)) < ROUNDING


# --- the faults of PEFT's own handling ---------------------------------------------------------------------------------------


def peft_output_or_error(base, directory):
    """PEFT's, to compare with: nothing here depends on whether it has the fault."""
    try:
        return outputs(peft.PeftModel.from_pretrained(copy.deepcopy(base), directory))
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compact", [False, True])
def test_half_precision_loads(dtype, compact, tmp_path):
    """PEFT 0.21 cannot load its own compact adapter of half precision: it scatters it into float32."""
    base, model = theirs(bert, save_only_topk_weights=compact, topk=4, **HEAD)
    base.to(dtype).float()
    model.to(dtype).save_pretrained(tmp_path)
    print("PEFT:", type(peft_output_or_error(base, tmp_path)).__name__)
    loaded = vblora.load(copy.deepcopy(base), tmp_path)
    adapter = loaded.vblora.default
    assert {
        tensor.dtype for tensor in (adapter.bank.vectors, adapter.logits, adapter.weights) if tensor is not None
    } == {torch.float32}
    saved = safetensors.torch.load_file(tmp_path / TENSORS_FILE)
    assert torch.equal(adapter.bank.vectors, saved[BANK].float())  # exactly
    model.float()  # what the file holds, as float32
    assert relative_error(outputs(loaded), outputs(model)) < (0.02 if compact else ROUNDING)


@pytest.mark.parametrize("topk", range(1, 9))
def test_sharp_weights_survive(topk, tmp_path):
    """PEFT 0.21 recovers the last weight as 1 minus the others, which rounds below 0, and takes its logarithm: NaN.

    25 random adapters for each k, with logits so far apart that most weights are all but 0.
    """
    torch.manual_seed(topk)
    base = torch.nn.Sequential(torch.nn.Linear(16, 24))
    model = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES | {"topk": topk}, target_modules=["0"]))
    vblora.save(model, tmp_path / "ours", form="peft-topk")
    other, x, nan_in_peft = from_peft(base, tmp_path / "ours"), torch.randn(4, 16), 0
    config = other.peft_config["default"]

    def in_peft(directory, compact):
        """By the same code as from_pretrained runs, which takes most of its time to make a model."""
        config.save_only_topk_weights = compact
        peft.set_peft_model_state_dict(other, peft.load_peft_weights(directory, device="cpu"))
        return other(x)

    with torch.no_grad():
        for _ in range(25):
            model.vblora.default.logits.copy_(torch.randn_like(model.vblora.default.logits) * 10)
            vblora.save(model, tmp_path / "ours", form="peft-topk")
            assert relative_error(in_peft(tmp_path / "ours", True), model(x)) < ROUNDING
            vblora.save(model, tmp_path / "dense", form="peft")
            assert relative_error(in_peft(tmp_path / "dense", False), model(x)) < ROUNDING
            config.save_only_topk_weights = True
            other.save_pretrained(tmp_path / "theirs")
            by_us = vblora.load(copy.deepcopy(base), tmp_path / "theirs")
            assert relative_error(by_us(x), model(x)) < ROUNDING
            nan_in_peft += in_peft(tmp_path / "theirs", True).isnan().any().item()
    print(f"k={topk}: PEFT's output of its own compact form is NaN for {nan_in_peft} of 25 adapters")


def test_tiny_weights_keep_their_value(tmp_path):
    """PEFT 0.21 loses a last weight below the rounding of 1, 6e-8; ours is never the last."""
    base, model = ours(bert, topk=3)
    with torch.no_grad():
        model.vblora.default.logits.copy_(-23.0 * torch.rand_like(model.vblora.default.logits).argsort(1))
    vblora.save(model, tmp_path, form="peft-topk")
    vblora.save(model, tmp_path / "deploy", form="deploy")
    wanted = vblora.load(copy.deepcopy(base), tmp_path / "deploy").vblora.default.weights
    assert wanted[:, 2].max() < 1e-19
    read = vblora.load(copy.deepcopy(base), tmp_path).vblora.default.weights
    assert torch.allclose(read, wanted, rtol=1e-6, atol=0)
    layer = from_peft(base, tmp_path).base_model.model.bert.encoder.layer[0].attention.self.query
    logits = layer.vblora_logits_A["default"].flatten(0, 1)
    assert torch.allclose(
        logits.softmax(1).sort(1, descending=True).values[:, :3], wanted[: len(logits)], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("compact", [False, True])
def test_a_checkpoint_without_its_bank_is_refused(compact, tmp_path):
    """PEFT 0.21 loads it without a word, over the bank that it drew."""
    base, model = theirs(bert, save_only_topk_weights=compact)
    model.save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.pop(BANK))
    print("PEFT:", type(peft_output_or_error(base, tmp_path)).__name__)
    with pytest.raises(ValueError, match=f"lacks its vector bank, tensor `{BANK}`"):
        vblora.load(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize("saved_again", [False, True])
def test_what_cannot_train_says_so(saved_again, tmp_path):
    """PEFT 0.21 makes a compact file trainable: its logits are -inf but for k, and it looks for that in one row alone."""
    base, model = theirs(bert, save_only_topk_weights=True)
    model.save_pretrained(tmp_path)
    if saved_again:  # as dense logits with -inf, which nothing tells from others
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        again.peft_config["default"].save_only_topk_weights = False
        again.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="train_kept=True"):
        vblora.load(copy.deepcopy(base), tmp_path, is_trainable=True)
    loaded = vblora.load(copy.deepcopy(base), tmp_path, is_trainable=True, train_kept=True)
    assert loaded.vblora.default.logits.isfinite().all() and loaded.vblora.default.logits.requires_grad
    assert relative_error(outputs(loaded), outputs(model)) < ROUNDING


# --- training goes on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "targets"), [(bert, ["dense"]), (gpt2, None)])
def test_training_goes_on_from_a_dense_checkpoint_as_in_peft(make, targets, tmp_path):
    base, model = theirs(make, topk=3, target_modules=targets)
    model.save_pretrained(tmp_path)
    ours = vblora.load(copy.deepcopy(base), tmp_path, is_trainable=True)
    labels = torch.tensor([0, 1]) if make is bert else IDS
    losses = []
    for trained in (ours, model):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.5)
        losses.append([])
        for _ in range(5):
            loss = trained.train()(input_ids=IDS, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    apart = max(abs(one - other) for one, other in zip(*losses, strict=True))
    assert abs(losses[0][-1] - losses[0][0]) > 1e-4 > 20 * apart
    vblora.save(ours, tmp_path / "on", form="peft")
    assert relative_error(outputs(from_peft(base, tmp_path / "on")), outputs(ours)) < ROUNDING


def test_peft_trains_on_from_our_dense_form(tmp_path):
    """With candidates, too: the logits that are none are drawn again."""
    base, model = ours(bert, num_candidates=6, seed=7)
    dense = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES, num_candidates=None, seed=7))
    vblora.save(model, tmp_path, form="peft")
    adapter = vblora.load(copy.deepcopy(base), tmp_path, is_trainable=True).vblora.default
    logits, candidates = adapter.logits.detach(), model.vblora.default.candidates.long()
    assert torch.equal(logits.gather(1, candidates), model.vblora.default.logits)
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, candidates, False)
    selected = model.vblora.default.logits.detach().topk(2).values[:, -1:].expand_as(logits)
    kept = others & (dense.vblora.default.logits < selected)
    assert kept.sum() > 0.5 * others.sum()
    assert torch.equal(logits[kept], dense.vblora.default.logits.detach()[kept])
    assert (logits[others] < selected[others]).all()
    loaded = from_peft(base, tmp_path, is_trainable=True).train()
    loaded(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad.isfinite().all() for p in loaded.parameters() if p.requires_grad)


def test_dense_logits_that_are_not_known_are_refused(tmp_path):
    base, model = ours(bert, num_candidates=6)
    vblora.save(model, tmp_path / "deploy", form="deploy")
    deployed = vblora.load(copy.deepcopy(base), tmp_path / "deploy")
    kept = vblora.load(copy.deepcopy(base), tmp_path / "deploy", train_kept=True)
    for other, message in ((deployed, "deployed one"), (kept, "no seed")):
        with pytest.raises(ValueError, match=f'{message}.*form="peft-topk"'):
            vblora.save(other, tmp_path / "dense", form="peft")
        assert not (tmp_path / "dense").exists()
        vblora.save(other, tmp_path / "topk", form="peft-topk")
        assert relative_error(outputs(from_peft(base, tmp_path / "topk")), outputs(model)) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["peft", "peft-topk", "lora"])
def test_an_adapter_of_another_dtype_is_written_so_that_it_loads(form, dtype, tmp_path):
    base, model = ours(bert, num_candidates=6, topk=4)
    model.vblora.default.to(dtype)
    vblora.save(model, tmp_path, form=form)
    model.vblora.default.float()
    assert relative_error(outputs(from_peft(base, tmp_path)), outputs(model)) < (0.01 if form == "lora" else ROUNDING)
    if form != "lora":
        assert relative_error(outputs(vblora.load(copy.deepcopy(base), tmp_path)), outputs(model)) < ROUNDING


def test_a_rounded_bank_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`bank_dtype` is torch\.bfloat16, but only"):
        vblora.save(ours(bert)[1], tmp_path, form="peft", bank_dtype=torch.bfloat16)


def test_loads_over_an_adapter_of_the_same_sizes(tmp_path):
    base, model = theirs(bert, bias="all", **HEAD)
    model.save_pretrained(tmp_path)
    other = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES, bias="all", num_candidates=None, **HEAD))
    vblora.load(other, tmp_path)
    assert relative_error(outputs(other), outputs(model)) < ROUNDING


def test_the_authors_own_peft(tmp_path):
    """Their fork, from before PEFT had VB-LoRA: logits_A is (in / b, r, h)."""
    base, model = theirs(bert, **SIZES | {"r": 4})  # r = in / b, so that no shape tells
    model.save_pretrained(tmp_path)

    def turn(tensors):
        tensors.update({name: t.transpose(0, 1) for name, t in tensors.items() if name.endswith("logits_A")})

    change(tmp_path, turn, {"init_weights": True, "save_topk_logits": False})
    assert relative_error(outputs(vblora.load(copy.deepcopy(base), tmp_path)), outputs(model)) < ROUNDING


# --- what is refused ---------------------------------------------------------------------------------------------------------

A = "base_model.model.bert.encoder.layer.0.attention.self.query.vblora_logits_A"
INDICES, WEIGHTS = A + "_topk_indices", A + "_topk_weights"


def tensor(name, make):
    return lambda d: change(d, lambda t: t.update({name: make(t[name])}))


def config(**values):
    return lambda d: change(d, lambda _: None, values)


DENSE = {
    "no config": (lambda d: (d / CONFIG_FILE).unlink(), "adapter_config.json is missing"),
    "not a JSON object": (lambda d: (d / CONFIG_FILE).write_text("{"), "not a JSON object"),
    "LoHa": (
        config(peft_type="LOHA"),
        "`peft_type` is 'LOHA'; of PEFT's adapters, vblora reads 'VBLORA', 'VERA', 'LORA'",
    ),
    "nobody's": (config(peft_type=None), "nor of PEFT's"),
    "unknown field": (config(scaling=3), "unknown config field `scaling`"),
    "field out of range": (config(topk=99), "`topk` is 99"),
    "other sizes": (config(num_vectors=17), "`base_model.vblora_vector_bank` is \\(16, 8\\), but must be \\(17, 8\\)"),
    "another rank": (config(r=3), "vblora_logits_A` is \\(2, 4, 16\\), but must be \\(3, 4, 16\\)"),
    "another form": (config(save_only_topk_weights=True), "there is no tensor .*vblora_logits_A_topk_indices"),
    "authors' compact form": (config(save_topk_logits=True), "save_topk_logits"),
    "half a layer": (lambda d: change(d, lambda t: t.pop(A)), f"lacks tensor `{A}`"),
    "a layer missing": (
        lambda d: change(d, lambda t: [t.pop(name) for name in list(t) if "layer.0.attention.self.query" in name]),
        "`bert.encoder.layer.0.attention.self.query` is a target in the model, but not in the file",
    ),
    "other layers": (config(target_modules=["key"]), "for other layers than the model's"),
    "unknown tensor": (lambda d: change(d, lambda t: t.update(x=torch.ones(1))), "unknown tensor `x`"),
    "unknown tensor of the model": (
        lambda d: change(d, lambda t: t.update({"base_model.model.bert.x.weight": torch.ones(1)})),
        "unknown tensor `bert.x.weight`",
    ),
    "NaN": (tensor(A, lambda t: t * float("nan")), f"`{A}` holds NaN"),
    "-inf alone": (tensor(A, lambda t: t.fill_(-torch.inf)), f"`{A}` holds a row of nothing but -inf"),
    "integers": (tensor(A, lambda t: t.int()), f"`{A}` is torch.int32"),
    "eight bits": (tensor(A, lambda t: t.to(torch.float8_e4m3fn)), f"`{A}` is torch.float8_e4m3fn; allowed are"),
    "two dimensions": (tensor(A, lambda t: t.flatten(0, 1)), f"`{A}` is \\(8, 16\\)"),
    "other widths": (tensor(A, lambda t: t[:, 1:]), "24 -> 32 there, 32 -> 32 here"),
    "an infinite bank": (tensor(BANK, lambda t: t / 0), f"`{BANK}` holds an infinite"),
    "cut short": (
        lambda d: (d / TENSORS_FILE).write_bytes((d / TENSORS_FILE).read_bytes()[:-9]),
        "damaged",
    ),
    "a head of other widths": (
        tensor("base_model.model.classifier.weight", lambda t: t[1:]),
        "`classifier.weight` is \\(1, 32\\)",
    ),
    "half a head": (
        lambda d: change(d, lambda t: t.pop("base_model.model.classifier.bias")),
        "lacks tensor `classifier.bias`",
    ),
}
COMPACT = {
    "no weights": (lambda d: change(d, lambda t: t.pop(WEIGHTS)), f"lacks tensor `{WEIGHTS}`"),
    "no indices": (lambda d: change(d, lambda t: t.pop(INDICES)), f"lacks tensor `{INDICES}`"),
    "an index too large": (tensor(INDICES, lambda t: t.fill_(16)), f"`{INDICES}` holds an index that is not"),
    "an index twice": (tensor(INDICES, lambda t: t.fill_(3)), f"`{INDICES}` names a bank vector twice"),
    "a weight too large": (tensor(WEIGHTS, lambda t: t + 1), f"`{WEIGHTS}` holds a weight"),
    "a weight NaN": (tensor(WEIGHTS, lambda t: t * float("nan")), f"`{WEIGHTS}` holds a weight"),
    "all k weights": (tensor(WEIGHTS, lambda t: torch.cat([t, t], -1)), f"`{WEIGHTS}` is \\(2, 4, 2\\)"),
    "another k": (config(topk=3), f"`{INDICES}` is \\(2, 4, 2\\), but must be \\(2, 4, 3\\)"),
    "another form": (config(save_only_topk_weights=False), "there is no tensor .*vblora_logits_A`"),
}


@pytest.mark.parametrize(
    ("compact", "damage"), [*((False, name) for name in DENSE), *((True, name) for name in COMPACT)]
)
def test_a_bad_folder_is_refused_and_changes_nothing(compact, damage, tmp_path):
    harm, message = (COMPACT if compact else DENSE)[damage]
    base, model = theirs(bert, save_only_topk_weights=compact, modules_to_save=["classifier"])
    model.save_pretrained(tmp_path)
    harm(tmp_path)
    names = [name for name, _ in base.named_modules()]
    target = copy.deepcopy(base)
    with pytest.raises(ValueError, match=message):
        vblora.load(target, tmp_path)
    assert [name for name, _ in target.named_modules()] == names
    assert all(p.requires_grad for p in target.parameters())
    assert torch.equal(outputs(target), outputs(base))


def test_a_bank_of_ones_own_is_not_needed(tmp_path):
    base, model = theirs(bert)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`bank` was given"):
        vblora.load(base, tmp_path, bank=vblora.VectorBank(16, 8))


def test_says_where_to_look(tmp_path):
    base, model = theirs(bert)
    model.save_pretrained(tmp_path)
    (tmp_path / TENSORS_FILE).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle.*save_pretrained"):
        vblora.load(base, tmp_path)
    model.add_adapter("second", model.peft_config["default"])
    model.save_pretrained(tmp_path / "several", selected_adapters=["second"])
    with pytest.raises(FileNotFoundError, match="sub-folders `second`: pass one"):
        vblora.load(base, tmp_path / "several")
    vblora.load(base, tmp_path / "several" / "second")


def test_forms_are_listed(tmp_path):
    with pytest.raises(ValueError, match="'resume', 'deploy', 'peft', 'peft-topk', 'lora'"):
        vblora.save(ours(bert)[1], tmp_path, form="PEFT")
    assert folder.FORMS == ("resume", "deploy", "peft", "peft-topk", "lora")
