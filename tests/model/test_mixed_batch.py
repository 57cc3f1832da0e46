"""Batches whose rows have adapters of their own: each row is what it is alone, and rows without one are the base model's."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vblora
from tests.small_models import Net, bert, gpt2, llama, relative_error
from vblora.layers.adapted import AdaptedLayer
from vblora.layers.rows import new_key

METHODS = {
    "vblora": vblora.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, init_vector_bank_bound=0.5, pad=True),
    "wider": vblora.VBLoRAConfig(r=3, num_vectors=12, vector_length=16, topk=3, init_vector_bank_bound=0.5, pad=True),
    "vera": vblora.VeraConfig(r=8, init_weights=False),
    "tied": vblora.TiedLoraConfig(r=2),
    "lora": vblora.LoraConfig(r=5, init_lora_weights=False),
}
NAMES = [None, *METHODS, "vblora", None]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)  # how much a network blows rounding up depends on its weights


def with_adapters(model: nn.Module, targets: dict[str, list[str]] | None = None) -> nn.Module:
    """The model with an adapter of each method, with updates of less than a layer's own output: rounding is not blown up."""
    for name, config in METHODS.items():
        config = copy.copy(config)
        config.target_modules = (targets or {}).get(name, "all-linear")
        vblora.inject(model, config, adapter_name=name)
    with torch.no_grad():
        model.vblora["tied"].B.normal_(std=0.1)
        model.vblora["vera"].e.fill_(0.05)
    return model.eval()


def rows_alone(model: nn.Module, names: list[str | None], run: Callable[[], Tensor]) -> list[Tensor]:
    """Each row of ``run``'s batch, all of which runs with that row's adapter."""
    of_name = {}
    for name in dict.fromkeys(names):
        vblora.set_adapter(model, [] if name is None else name)
        of_name[name] = run()
    return [of_name[name][row] for row, name in enumerate(names)]


def assert_rows(mixed: Tensor, alone: list[Tensor], names: list[str | None], tolerance: float) -> None:
    """Errors are relative to the norm that rows have on average: a row of three elements may cancel to almost nothing."""
    assert len(mixed) == len(alone)
    norm = torch.stack(alone).norm() / len(alone) ** 0.5
    for row, (name, expected) in enumerate(zip(names, alone, strict=True)):
        if name is None:
            assert torch.equal(mixed[row], expected), row
        else:
            assert (mixed[row] - expected).norm() < tolerance * norm, (row, name)


@torch.no_grad()
def test_a_first_forward_with_mixed_rows_does_not_warn_about_uncalled_layers():
    model = with_adapters(Net(blocks=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 16), adapter_names=["lora", None])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("shape", [(8, 16), (8, 5, 16), (8, 2, 3, 16)])
@torch.no_grad()
def test_each_row_is_what_it_is_alone(dtype, tolerance, shape):
    model = with_adapters(Net(blocks=2).to(dtype), {"vblora": ["up", "embed"], "lora": ["down"]})
    x = torch.randn(shape, dtype=dtype)
    alone = rows_alone(model, NAMES, lambda: model(x))
    assert relative_error(alone[1], model(x)[1]) > 2 * tolerance  # what the adapters do shows
    for active in ([], ["lora"], ["vera", "tied"]):  # what is active makes no difference
        vblora.set_adapter(model, active)
        before = model(x)
        assert_rows(model(x, adapter_names=NAMES), alone, NAMES, tolerance)
        assert torch.equal(model(x), before)
    vblora.set_adapter(model, [])
    assert torch.equal(model(x, adapter_names=[None] * 8), model(x))


@torch.no_grad()
def test_all_rows_with_adapters_and_autocast():
    model = with_adapters(Net(blocks=2))
    names = ["lora", "vblora", "wider"]
    x = torch.randn(3, 5, 16)
    assert_rows(model(x, adapter_names=names), rows_alone(model, names, lambda: model(x)), names, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert_rows(model(x, adapter_names=names), rows_alone(model, names, lambda: model(x)), names, 3e-2)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.first = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.second = nn.Conv1d(16, 8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.embed(ids).transpose(1, 2))))


@torch.no_grad()
def test_embeddings_and_convolutions():
    model = Convolutional().double()
    names = ["lora", None, "vera", "tied", "lora"]
    for name in ("lora", "vera", "tied"):
        config = copy.copy(METHODS[name])
        config.target_modules = ["embed", "first", "second"]
        vblora.inject(model, config, adapter_name=name)
        for parameter in model.vblora[name].parameters():
            parameter.normal_()
    ids = torch.randint(20, (5, 6))
    alone = rows_alone(model, names, lambda: model(ids))
    assert_rows(model(ids, adapter_names=names), alone, names, 1e-12)
    assert relative_error(alone[0], alone[4]) > 0.1


@pytest.mark.parametrize("make", [llama, gpt2, bert])
@torch.no_grad()
def test_models_of_transformers(make):
    model = with_adapters(make().double())
    ids = torch.randint(3, 50, (8, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][1, :4] = batch["attention_mask"][4, :6] = 0
    alone = rows_alone(model, NAMES, lambda: model(**batch).logits)
    assert_rows(model(**batch, adapter_names=NAMES).logits, alone, NAMES, 1e-12)


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sequences of beams": {"num_beams": 3, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_generate(make, how):
    model = with_adapters(make())
    choice = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, **GENERATION[how]}
    names = [None, "vblora", "lora", "wider", None]
    batch = {"input_ids": torch.randint(3, 50, (5, 7)), "attention_mask": torch.ones(5, 7, dtype=torch.long)}
    batch["attention_mask"][1, :3] = 0  # padding on the left
    mixed = model.generate(**batch, **choice, adapter_names=names)
    per_row = choice.get("num_return_sequences", 1)
    alone = rows_alone(model, names, lambda: model.generate(**batch, **choice).unflatten(0, (5, per_row)))
    assert torch.equal(mixed.unflatten(0, (5, per_row)), torch.stack(alone))
    assert len({tuple(row[0, 7:].tolist()) for row in alone}) > 2


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 16, "max_source_positions": 8}
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
    tokens = {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return WhisperForConditionalGeneration(WhisperConfig(vocab_size=50, max_target_positions=16, **sizes, **tokens))


@pytest.mark.filterwarnings("ignore")
def test_generate_of_whisper_which_repeats_rows_twice():
    model = with_adapters(whisper())
    names, features = ["lora", None], torch.randn(2, 16, 16)
    for beams, sequences in ((2, 2), (3, 2), (1, 1)):
        choice = {"num_beams": beams, "num_return_sequences": sequences, "max_new_tokens": 5, "min_new_tokens": 5}
        alone = rows_alone(model, names, lambda choice=choice: model.generate(features, **choice).unflatten(0, (2, -1)))
        assert torch.equal(model.generate(features, **choice, adapter_names=names), torch.cat(alone))
    assert not torch.equal(*alone)
    for choice, what in (
        ({"input_features": torch.randn(2, 16, 32)}, "`input_features` of 32 frames, more than 16,"),
        ({"input_features": features, "return_timestamps": True}, "`return_timestamps`"),
        ({"input_features": features, "temperature": (0.0, 0.5)}, "`temperature` with several values"),
    ):
        with pytest.raises(ValueError, match=f"{what} makes WhisperForConditionalGeneration generate again for some"):
            model.generate(**choice, adapter_names=names)


def test_a_disabled_model_is_its_base_model_within_generate():
    model = with_adapters(llama())
    ids = torch.randint(3, 50, (2, 5))
    vblora.set_adapter(model, [])
    expected = model(ids).logits
    found = []

    def base_logits(input_ids: Tensor, scores: Tensor) -> Tensor:
        with vblora.disabled(model):
            found.append(model(input_ids).logits)
        return scores

    model.generate(ids, adapter_names=["lora", "tied"], max_new_tokens=1, logits_processor=[base_logits])
    assert torch.equal(found[0], expected)


def test_calls_that_would_lose_the_names_are_refused(tiny_model):
    from transformers import AutoTokenizer, TextClassificationPipeline

    model = with_adapters(bert())
    pipeline = TextClassificationPipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(tiny_model))
    with pytest.raises(ValueError, match="given to a TextClassificationPipeline, which does not pass it on"):
        pipeline(["good", "bad"], adapter_names=["lora", None])
    assert len(pipeline(["good", "bad"])) == 2
    with pytest.raises(ValueError, match="given to `generate_batch`"):
        with_adapters(llama()).generate_batch([[3, 4], [5]], adapter_names=["lora", None])


def test_several_samples_of_each_row():
    model = with_adapters(llama())
    names = ["lora", None]
    choice = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3, "pad_token_id": 0}
    choice |= {"eos_token_id": None, "output_scores": True, "return_dict_in_generate": True}
    batch = {"input_ids": torch.randint(3, 50, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    found = model.generate(**batch, **choice, adapter_names=names)
    for first, name in ((0, "lora"), (3, None)):
        vblora.set_adapter(model, [] if name is None else name)
        with torch.no_grad():
            logits = model(input_ids=found.sequences[first : first + 3]).logits
        for step, scores in enumerate(found.scores):
            expected = logits[:, 4 + step]
            seen = scores[first : first + 3].isfinite()  # of those that sampling chose from
            assert torch.allclose(scores[first : first + 3][seen], expected[seen], atol=1e-4)


def test_copies_and_pickles_generate_with_their_own_adapters():
    model = with_adapters(llama())
    ids = torch.randint(3, 50, (2, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "pad_token_id": 0}
    batch["adapter_names"] = ["lora", None]
    expected = model.generate(**batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            model.vblora["lora"].factors.zero_()
        assert torch.equal(other.generate(**batch), expected)
    plain = vblora.eject(model)
    assert "generate" not in vars(plain)
    with pytest.raises(ValueError, match="adapter_names"):
        plain.generate(**batch)


class Swallows(Net):
    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        assert not kwargs
        return super().forward(x)


@torch.no_grad()
def test_a_model_that_takes_any_argument_does_not_swallow_the_names():
    model = with_adapters(Swallows(blocks=2))
    x = torch.randn(8, 16)
    alone = rows_alone(model, NAMES, lambda: model(x))
    assert_rows(model(x, adapter_names=NAMES), alone, NAMES, 1e-6)
    assert torch.equal(model(x, adapter_names=None), model(x))


def refusals():
    yield "unknown", ["lora", "nobody"], "names 'nobody'; the model's adapters are vblora, wider", None
    yield "too few", ["lora"], "has 1 names, but the batch has 2 rows", None
    yield "too many", ["lora"] * 3, "has 3 names, but the batch has 2 rows", None
    yield "none", [], "has 0 names", None
    yield "merged", ["vblora", None], "is merged", lambda model: vblora.merge(model)
    yield "trained head", ["saved", None], "names 'saved', which trained `head.weight`", None
    yield "active head", ["lora", None], "adapter 'saved' is active", lambda model: vblora.set_adapter(model, "saved")
    yield "gradients", ["lora", None], "gradients are recorded", lambda model: torch.set_grad_enabled(True)
    yield "dropout", ["dropping", None], "has dropout", lambda model: model.train()


@pytest.mark.parametrize(
    ("names", "message", "change"), [case[1:] for case in refusals()], ids=[c[0] for c in refusals()]
)
@torch.no_grad()
def test_refused_before_anything_runs(names, message, change):
    model = with_adapters(Net(blocks=2))
    extra = {"saved": {"target_modules": ["up"], "modules_to_save": ["head"]}}
    extra["dropping"] = {"target_modules": ["up"], "lora_dropout": 0.5}
    for name, fields in extra.items():
        vblora.inject(model, vblora.LoraConfig(**fields), adapter_name=name)
    if change is not None:
        change(model)
    ran = []
    model.embed.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=message):
        model(torch.randn(2, 16), adapter_names=names)
    assert not ran
    with torch.no_grad():
        model.eval()(torch.randn(3, 16))  # and it is as if there had been no such call
    assert ran


@torch.no_grad()
def test_refused_while_disabled_and_by_type():
    model = with_adapters(Net(blocks=2))
    with vblora.disabled(model), pytest.raises(ValueError, match="are disabled"):
        model(torch.randn(1, 16), adapter_names=["lora"])
    for names in ("lora", [1], {"lora": 1}):
        with pytest.raises(TypeError, match="must be a list"):
            model(torch.randn(4, 16), adapter_names=names)


@pytest.mark.parametrize("argument", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_generation_is_refused_by_name(argument):
    model = with_adapters(llama())
    ids = torch.randint(3, 50, (1, 5))
    value = {"assistant_model": model, "prompt_lookup_num_tokens": 2}[argument]
    with pytest.raises(ValueError, match=argument):
        model.generate(ids, adapter_names=["lora"], **{argument: value})
    with pytest.raises(ValueError, match="has 2 names, but the batch has 1 rows"):
        model.generate(ids, adapter_names=["lora", None])


class Flattens(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@torch.no_grad()
def test_a_layer_that_does_not_see_rows_is_named():
    model = with_adapters(Flattens(blocks=1))
    with pytest.raises(ValueError, match=r"layer `embed` got an input of shape \(6, 16\)"):
        model(torch.randn(2, 3, 16), adapter_names=["lora", None])
    assert model(torch.randn(2, 3, 16)).shape == (2, 3, 3)


@torch.no_grad()
def test_rows_that_are_not_the_first_dimension_are_refused():
    def encoder(**how):
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, **how), 1, enable_nested_tensor=False)

    x = torch.randn(2, 2, 16)
    targets = {name: ["linear1"] for name in METHODS}
    with pytest.raises(ValueError, match=r"what the layers in `layers.0` get is the positions"):
        with_adapters(encoder(), targets)(x, adapter_names=["lora", None])
    model = with_adapters(encoder(batch_first=True), targets)
    assert_rows(
        model(x, adapter_names=["lora", None]),
        rows_alone(model, ["lora", None], lambda: model(x)),
        ["lora", None],
        1e-5,
    )


@pytest.mark.parametrize(
    ("kind", "sizes", "name"),
    [
        ("XLNetModel", {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 64}, "`XLNetModel`"),
        (
            "LongformerModel",
            {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "attention_window": [4]},
            "`encoder.layer.0.attention.self`",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`target_modules` cannot reach")  # XLNet's attention, which has no layers
@torch.no_grad()
def test_models_of_transformers_that_transpose_the_rows_are_refused(kind, sizes, name):
    import transformers

    cls = getattr(transformers, kind)
    model = with_adapters(cls(cls.config_class(vocab_size=50, intermediate_size=64, **sizes)))
    with pytest.raises(ValueError, match=f"what the layers in {name} get is the positions"):
        model(torch.randint(3, 50, (4, 4)), adapter_names=["lora", None, "lora", "lora"])


@torch.no_grad()
def test_an_empty_batch():
    model = with_adapters(Net(blocks=1))
    assert model(torch.randn(0, 16), adapter_names=[]).shape == (0, 3)
    with pytest.raises(ValueError, match="0 names, but the batch has 2 rows"):
        model(torch.randn(2, 16), adapter_names=[])


@torch.no_grad()
def test_an_interrupted_call_leaves_nothing_behind():
    model = with_adapters(Net(blocks=2))
    vblora.set_adapter(model, [])
    x = torch.randn(2, 16)
    expected = model(x)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x, adapter_names=["lora", "vera"])
    handle.remove()
    assert torch.equal(model(x), expected)


def test_threads_do_not_see_each_others_adapters(one_thread):
    model = with_adapters(Net(blocks=4).double())
    vblora.set_adapter(model, "tied")
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    batches = [["lora", None], ["vera", "vblora"], [None, "wider"], None]
    with torch.no_grad():
        expected = [model(x, adapter_names=names) for names in batches]
    wrong = []
    started = threading.Barrier(4)

    @torch.no_grad()
    def serve(number: int) -> None:
        started.wait()
        for _ in range(50):
            found = model(x, adapter_names=batches[number])
            # Not the same bits: a thread's own number of threads rounds in its own way.
            if relative_error(found, expected[number]) > 1e-12:
                wrong.append(number)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_training_and_serving_take_turns():
    """What is composed for a batch is made anew once training has moved on."""
    model = with_adapters(Net(blocks=2).double())
    x = torch.randn(2, 16, dtype=torch.float64)
    model(x, adapter_names=["vblora", None])
    model.vblora["vblora"].bank.vectors.mul_(2)
    names = ["vblora", None]
    assert_rows(model(x, adapter_names=names), rows_alone(model, names, lambda: model(x)), names, 1e-12)
    with torch.enable_grad():
        vblora.set_adapter(model, "vblora")
        model(x).sum().backward()
    assert model.vblora["vblora"].logits.grad is not None


def test_a_cuda_graph_does_not_capture_the_adapters_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters(llama())
    ids = torch.randint(3, 60, (2, 5))
    monkeypatch.setattr(vblora.streams, "capturing", lambda _device=None: True)
    with torch.no_grad(), pytest.raises(ValueError, match="`adapter_names` is given while a CUDA graph is captured"):
        model(ids, adapter_names=["lora", None])
    # Inductor leaves the operator out of its CUDA graphs.
    assert torch.Tag.cudagraph_unsafe in torch.ops.vblora.add_row_updates.default.tags


def test_the_key_of_a_layer_is_not_on_a_gpu() -> None:
    with torch.device("meta"):  # the default device; a GPU would be waited for in each call of each layer
        assert new_key(AdaptedLayer(nn.Linear(4, 4, device="cpu"))).device.type == "cpu"
