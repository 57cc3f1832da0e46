"""Under ``transformers.Trainer``: what checkpoints hold, that a resumed run is the uninterrupted one, and the usual options."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

import vblora
from tests.checkpointing import checkpointing
from tests.sentences import batches, encoder
from tests.workers import run_in_processes
from vblora.integrations.transformers import VBLoRACallback, trainer_arguments

CONFIG = {"r": 4, "num_vectors": 256, "vector_length": 64, "vblora_dropout": 0.1}
CONFIG |= {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}


pytestmark = pytest.mark.usefixtures("one_thread")


def rows(count=4):
    return [{name: tensor[i] for name, tensor in batch.items()} for batch in batches()[:count] for i in range(4)]


def injected(torch_seed=0, **choice):
    torch.manual_seed(torch_seed)  # of the bank and the logits
    return vblora.inject(encoder(), vblora.VBLoRAConfig(**CONFIG | choice))


def settings(folder, **choice):
    defaults = {"max_steps": 8, "save_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 4}
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    return TrainingArguments(str(folder), **fixed | defaults | choice)


def groups_of(model):
    return vblora.parameter_groups(model, lr_bank=0.1, lr_logits=0.1, lr_other=0.01)


def optimizer_of(model):
    return torch.optim.AdamW(groups_of(model))


def trainer_of(model, folder, *, by_class=False, data=None, **choice):
    how = {"optimizers": (optimizer_of(model), None)}
    if by_class:
        how = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups_of(model)})}
    data = rows() if data is None else data
    return Trainer(
        model, settings(folder, **choice), train_dataset=data, eval_dataset=data, callbacks=[VBLoRACallback()], **how
    )


def trained_tensors(model):
    beside = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        *beside,
        *(tensor for tensor in (model.vblora.default.candidates, model.vblora.default.exhausted) if tensor is not None),
    ]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# Checkpoints


def test_a_checkpoint_of_an_adapter_that_is_not_active_is_refused(tmp_path):
    model = vblora.inject(injected(), vblora.VBLoRAConfig(**CONFIG), adapter_name="b")
    vblora.set_adapter(model, "b")
    trainer_of(model, tmp_path, max_steps=1, save_steps=1).train()
    vblora.set_adapter(model, "default")
    with pytest.raises(
        ValueError, match=r"holds adapter 'b', but 'default' is active. Call vblora.set_adapter\(model, 'b'"
    ):
        trainer_of(model, tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    trainer_of(injected(), tmp_path, max_steps=2).train(resume_from_checkpoint=True)  # under another name


@pytest.mark.parametrize("by_class", [False, True], ids=["optimizer", "its class"])
@pytest.mark.parametrize("num_candidates", [None, 3])
def test_a_resumed_run_is_the_uninterrupted_one(num_candidates, by_class, tmp_path):
    choice = {"num_candidates": num_candidates}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have used up their 3 candidates")
        whole = trainer_of(injected(**choice), tmp_path / "whole", by_class=by_class)
        whole.train()
        again = trainer_of(injected(torch_seed=1, **choice), tmp_path / "again", by_class=by_class)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for ours, theirs in zip(trained_tensors(again.model), trained_tensors(whole.model), strict=True):
        assert torch.equal(ours, theirs)
    assert losses(again) == losses(whole)
    assert len(set(losses(whole))) == 8
    assert again.model.vblora.default.seed == whole.model.vblora.default.seed
    if num_candidates:
        assert again.model.vblora.default.exhausted.any()
    ours, theirs = (t.optimizer.optimizer.state_dict()["state"] for t in (again, whole))
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("kind", [vblora.VeraConfig, vblora.TiedLoraConfig, vblora.LoraConfig])
def test_a_resumed_run_of_another_method(kind, tmp_path):
    def model_of(seed):
        torch.manual_seed(seed)
        config = kind(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
        return vblora.inject(encoder(), config)

    whole = trainer_of(model_of(0), tmp_path / "whole")
    whole.train()
    again = trainer_of(model_of(1), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(again) == losses(whole) and len(set(losses(whole))) == 8
    trained = [{n: p for n, p in t.model.named_parameters() if p.requires_grad} for t in (again, whole)]
    assert trained[0].keys() == trained[1].keys() and all(torch.equal(p, trained[1][n]) for n, p in trained[0].items())


def test_a_checkpoint_is_an_adapters_folder_without_base_weights(tmp_path):
    trainer = trainer_of(injected(), tmp_path, max_steps=2, save_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert {"adapter_model.safetensors", "model.safetensors", "optimizer.pt"} <= {f.name for f in folder.iterdir()}
    adapter, trainers = ((folder / name).stat().st_size for name in ("adapter_model.safetensors", "model.safetensors"))
    assert trainers < adapter + 4096 < 200_000  # the encoder takes 50 MB
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    assert any(
        "values" in moments.get("exp_avg", {}) for moments in state.values() if isinstance(moments["exp_avg"], dict)
    )
    assert (folder / "optimizer.pt").stat().st_size < 3 * adapter
    inputs = {name: tensor for name, tensor in batches()[0].items() if name != "labels"}
    fresh = vblora.load(encoder().eval(), folder)
    assert torch.equal(fresh(**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_a_trainer_that_casts_what_trains_does_not_round_the_adapter(tmp_path):
    """SFTTrainer does that on a quantised base, before the Trainer's own initialization."""

    class Casting(Trainer):
        def __init__(self, model, *args, **given):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
            super().__init__(model, *args, **given)

    model = injected()
    before = [parameter.detach().clone() for parameter in model.vblora.default.parameters()]
    Casting(model, settings(tmp_path), train_dataset=rows(), **trainer_arguments(model))
    for parameter, values in zip(model.vblora.default.parameters(), before, strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, values)


def test_the_model_saves_itself_again_once_it_is_ejected(tmp_path):
    trainer = trainer_of(injected(), tmp_path / "run", max_steps=1, save_steps=1)
    trainer.train()
    copied = copy.deepcopy(trainer.model)
    trainer.save_model(str(tmp_path / "adapter"))
    vblora.load(encoder(), tmp_path / "adapter")
    with torch.no_grad():
        copied.vblora.default.bank.vectors.zero_()
    copied.save_pretrained(tmp_path / "copy")
    assert not vblora.load(encoder(), tmp_path / "copy").vblora.default.bank.vectors.any()
    vblora.eject(trainer.model)
    trainer.model.save_pretrained(tmp_path / "base")
    type(trainer.model).from_pretrained(tmp_path / "base")
    trainer.model.load_state_dict(encoder().state_dict())


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = injected()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "greater_is_better": True}
    trainer = trainer_of(model, tmp_path, max_steps=3, save_steps=1, metric_for_best_model="loss", **best)
    trainer.train()
    chosen = trainer.state.best_model_checkpoint
    assert chosen
    kept = vblora.load(encoder(), chosen)
    assert torch.equal(kept.vblora.default.logits, model.vblora.default.logits)
    assert torch.equal(kept.vblora.default.bank.vectors, model.vblora.default.bank.vectors)
    assert model.vblora.default.logits.requires_grad


def test_a_callback_that_comes_too_late_is_no_silent_restart(tmp_path):
    trainer_of(injected(), tmp_path, max_steps=1, save_steps=1).train()
    model = injected()
    late = Trainer(model, settings(tmp_path), train_dataset=rows(), optimizers=(optimizer_of(model), None))
    late.add_callback(VBLoRACallback())
    with pytest.raises(ValueError, match=r"was not restored.*when you make the Trainer"):
        late.train(resume_from_checkpoint=True)


def test_model_init_makes_models_that_resume_if_each_is_prepared(tmp_path):
    def trainer(model_init):
        choice = {"max_steps": 2, "save_steps": 1, "learning_rate": 0.1}
        callbacks = [VBLoRACallback()]
        return Trainer(
            model_init=model_init, args=settings(tmp_path, **choice), train_dataset=rows(), callbacks=callbacks
        )

    def prepared():
        model = injected(num_candidates=3)
        VBLoRACallback(model)
        return model

    whole = trainer(prepared)
    whole.train()
    first = str(tmp_path / "checkpoint-1")
    again = trainer(prepared)
    again.train(resume_from_checkpoint=first)
    for ours, theirs in zip(trained_tensors(again.model), trained_tensors(whole.model), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"was not restored.*In `model_init`, call VBLoRACallback\(model\) after"):
        trainer(lambda: injected()).train(resume_from_checkpoint=first)
    grown = vblora.inject(encoder(), vblora.VBLoRAConfig(**CONFIG, num_candidates=5))
    with pytest.raises(
        ValueError, match=r"it has 3 logits per row, .* has 5.*num_candidates=3, resume, and call vblora.grow"
    ):
        trainer_of(grown, tmp_path).train(resume_from_checkpoint=first)


def test_packed_state_is_not_for_an_optimizer_that_the_trainer_makes(tmp_path):
    trainer_of(injected(), tmp_path, max_steps=1, save_steps=1).train()
    other = trainer_of(injected(), tmp_path, by_class=True)
    with pytest.raises(ValueError, match=r"state is packed.*optimizers=\(optimizer, None\)"):
        other.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    trainer_of(injected(), tmp_path, max_steps=1, save_steps=1).train()
    other = trainer_of(injected(r=2), tmp_path)
    with pytest.raises(ValueError, match="another config"):
        other.train(resume_from_checkpoint=True)


def train_under_ddp(folder):
    choice = {"seed": 3, "num_candidates": 32}
    how = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2}
    whole = trainer_of(injected(**choice), folder / "whole", **how)
    whole.train()
    again = trainer_of(injected(**choice), folder / "again", **how)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    kind = type(again.model_wrapped).__name__
    return kind, *((losses(run), [t.detach() for t in trained_tensors(run.model)]) for run in (whole, again))


@pytest.mark.slow
def test_two_processes_resume_what_the_first_saved(tmp_path):
    returned = run_in_processes(train_under_ddp, tmp_path, tmp_path)
    runs = [run for _, *runs in returned for run in runs]
    assert [kind for kind, *_ in returned] == ["DistributedDataParallel"] * 2
    for values, tensors in runs:
        assert values == runs[0][0] and len(set(values)) == 4
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, runs[0][1], strict=True))
    kept = vblora.load(encoder(), tmp_path / "whole" / "checkpoint-4")
    assert any(torch.equal(kept.vblora.default.logits, tensor) for tensor in runs[0][1])


# In one line


def test_one_line_gives_the_trainer_its_groups_and_checkpoints(tmp_path):
    model = injected()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        how = settings(tmp_path, max_steps=4, save_steps=2)
        trainer = Trainer(model, how, train_dataset=rows(), **trainer_arguments(model, recipe="paper", lr_other=0.01))
        trainer.train()
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"bank": 1e-3, "logits": 1e-2, "other": 0.01}
    again = injected(torch_seed=1)
    resumed = Trainer(again, how, train_dataset=rows(), **trainer_arguments(again, recipe="paper", lr_other=0.01))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(trainer)
    with pytest.raises(TypeError, match="`save_pretrained`, which Sequential does not have"):
        trainer_arguments(torch.nn.Sequential(model))


def test_the_trainers_own_optimizer_is_warned_of(tmp_path):
    model = injected()
    trainer = Trainer(model, settings(tmp_path, max_steps=2, save_strategy="no"), train_dataset=rows())
    with pytest.warns(UserWarning, match=r"the logits at 5e-05.* far below .*trainer_arguments\(model\)") as caught:
        trainer.train()
    assert len([w for w in caught if "far below" in str(w.message)]) == 1


# Options


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.5},
        {"bf16": True},
        checkpointing(use_reentrant=False),
        checkpointing(use_reentrant=True),
        {"bf16": True, **checkpointing(), "gradient_accumulation_steps": 2, "max_grad_norm": 1.0},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_the_usual_options(options, tmp_path):
    choice = {"max_steps": 16, "lr_scheduler_type": "constant", "save_strategy": "no"}
    choice["per_device_train_batch_size"] = 8 // options.get("gradient_accumulation_steps", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The head is frozen: it is the adapter that learns the 8 rows.
        trainer = trainer_of(injected(modules_to_save=None), tmp_path, data=rows(2), **choice, **options)
        trainer.train()
    falling = losses(trainer)
    assert sum(falling[-4:]) < 0.8 * sum(falling[:4])
    assert all(parameter.grad is None for parameter in trainer.model.parameters() if not parameter.requires_grad)


class Handmade(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = vblora.VBLinear(16, 16, num_vectors=32, vector_length=4, num_candidates=8, seed=1)
        self.post_init()

    def forward(self, x):
        return self.layer(x)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (vblora.VectorBank, vblora.adapters.VBLoRAAdapter)):
            module.reset_parameters()


def test_a_model_with_a_vblinear_takes_checkpoints_with_and_without_the_adapter(tmp_path):
    model = Handmade(PretrainedConfig())
    torch.nn.init.normal_(model.layer.adapter.logits)
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 16)
    assert torch.equal(Handmade.from_pretrained(tmp_path)(x), model(x))
    base = {name: t for name, t in load_file(tmp_path / "model.safetensors").items() if "base_layer" in name}
    save_file(base, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = Handmade.from_pretrained(tmp_path)
    drawn = loaded.layer.adapter.initial()
    assert torch.equal(loaded.layer.adapter.logits, drawn.logits)
    assert torch.equal(loaded.layer.adapter.candidates, drawn.candidates)
    assert 0 < loaded.layer.adapter.bank.vectors.abs().max() <= 0.02
