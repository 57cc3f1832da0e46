"""Lightning, under both of its names: checkpoints hold no base model, and resume bit for bit."""

import importlib
import types
import warnings

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import Net

pytest.importorskip("lightning")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

CONFIG = vblora.VBLoRAConfig(
    r=2, num_vectors=16, vector_length=8, num_candidates=12, target_modules=["up", "down"], seed=0
)
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
STEPS = 8


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request):
    return importlib.import_module(request.param)


def batches_of(size):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :3].sum(1)), batch_size=size)


@pytest.fixture(scope="module")
def data():
    """One batch, because Lightning 2.6 repeats one when it resumes from the end of an epoch."""
    return batches_of(8)


def task_of(package, config=CONFIG, rates=None, around=False):
    """A LightningModule that holds an injected model and a head, or one that is injected itself."""

    class Task(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.strict_loading = False
            torch.manual_seed(0)
            self.model = Net(blocks=2)
            if around:
                vblora.inject(self, config)
            else:
                vblora.inject(self.model, config)
            torch.manual_seed(0)
            self.scores = nn.Linear(3, 1)  # outside the injected model

        def loss(self, batch):
            x, y = batch
            return (self.scores(self.model(x))[:, 0] - y).square().mean()

        def training_step(self, batch, _):
            return self.loss(batch)

        def validation_step(self, batch, _):
            self.log("loss", self.loss(batch))

        def configure_optimizers(self):
            groups = vblora.parameter_groups(self) if rates is None else self.parameters()
            optimizer = torch.optim.AdamW(groups, **rates or {"weight_decay": 0.0})
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer), "interval": "step"}]

    return Task()


def trainer_of(package, folder, accumulate=1, **choice):
    from vblora.integrations.lightning import VBLoRACallback

    saver = package.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=STEPS // 2, save_top_k=-1, **choice)
    return package.Trainer(
        **QUIET,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        callbacks=[saver, VBLoRACallback()],
    )


def test_a_checkpoint_is_small_and_resumes_bit_for_bit(package, data, tmp_path):
    whole, again = task_of(package), task_of(package)
    start = {name: tensor.clone() for name, tensor in vblora.adapter_state_dict(whole).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", vblora.VBLoRAWarning)
        trainer_of(package, tmp_path).fit(whole, data)
        trainer_of(package, tmp_path / "again").fit(again, data, ckpt_path=tmp_path / f"step={STEPS // 2}.ckpt")
    for name, tensor in vblora.adapter_state_dict(whole).items():
        assert torch.equal(vblora.adapter_state_dict(again)[name], tensor), name
        assert not torch.equal(start[name], tensor) or not tensor.is_floating_point(), name

    checkpoint = torch.load(tmp_path / f"step={STEPS}.ckpt", weights_only=True)
    adapter = "model.vblora.default."
    names = {f"{adapter}{name}" for name in ("logits", "candidates", "exhausted", "bank.vectors", "_extra_state")}
    assert checkpoint["state_dict"].keys() == names | {"scores.weight", "scores.bias"}
    packed = [state["exp_avg"] for state in checkpoint["optimizer_states"][0]["state"].values()]
    assert any(isinstance(state, dict) for state in packed)  # of the logits


def test_checkpoints_are_read_without_training(package, data, tmp_path):
    trained = task_of(package)
    trainer = trainer_of(package, tmp_path, save_weights_only=True)
    trainer.fit(trained, data)
    path = tmp_path / f"step={STEPS}.ckpt"
    assert not any("base_layer" in name for name in torch.load(path, weights_only=True)["state_dict"])
    wanted = trainer.validate(trained, data, verbose=False)
    assert trainer.validate(task_of(package), data, verbose=False) != wanted
    assert trainer_of(package, tmp_path).validate(task_of(package), data, ckpt_path=path, verbose=False) == wanted

    alone = type(trained).load_from_checkpoint(path)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in alone.state_dict().items())

    whole = tmp_path / "whole.ckpt"  # written without the callback
    plain = package.Trainer(**QUIET)
    plain.strategy.connect(trained)
    plain.save_checkpoint(whole, weights_only=True)
    assert any("base_layer" in name for name in torch.load(whole, weights_only=True)["state_dict"])
    assert trainer_of(package, tmp_path).validate(task_of(package), data, ckpt_path=whole, verbose=False) == wanted

    other = vblora.LoraConfig(r=2, target_modules=["up"])
    for task in (task_of(package, other), task_of(package, around=True)):
        with pytest.raises(ValueError, match="do not have the same adapter: only one of them has"):
            trainer_of(package, tmp_path).validate(task, data, ckpt_path=path, verbose=False)


def test_a_training_step_composes_once(package, tmp_path):
    task = task_of(package, around=True)  # Lightning calls `training_step`, which calls `self.model`
    adapter, composed = task.vblora.default, []
    compose = adapter.compose
    adapter.compose = lambda dtype, span=None: composed.append(span) or compose(dtype, span)
    trainer_of(package, tmp_path, accumulate=2).fit(task, batches_of(4))
    assert composed == [range(4)] * 2 * STEPS


def test_low_learning_rates_are_warned_of(package, data, tmp_path):
    with pytest.warns(vblora.VBLoRAWarning, match="far below"):
        trainer_of(package, tmp_path).fit(task_of(package, rates={"lr": 1e-5}), data)


def test_what_cannot_work_is_refused(package, data, tmp_path):
    from vblora.integrations.lightning import VBLoRACallback

    class Bare(package.LightningModule):
        def training_step(self, batch, _):
            return None

        def configure_optimizers(self):
            return None

    with pytest.raises(ValueError, match="Bare has no adapter"):
        trainer_of(package, tmp_path).fit(Bare(), data)
    sharded = types.SimpleNamespace(strategy=package.strategies.FSDPStrategy())
    with pytest.raises(ValueError, match="cannot save under FSDPStrategy"):
        VBLoRACallback().setup(sharded, task_of(package), "fit")
