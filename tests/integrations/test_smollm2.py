"""A causal language model as it is used: SmolLM2-135M-Instruct, all linear layers adapted, learns a few sentences."""

import pytest
import torch
from transformers import AutoTokenizer

import vblora
from benchmarks import models, serving
from tests.small_models import relative_error
from vblora.serving import AdapterStore

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

TEXT = "The moon is made of green cheese, and every child on the moon knows how to bake bread with it."


@pytest.fixture(scope="module")
def base():
    return models.smollm2()


def test_fine_tuning_lowers_the_loss_and_reaches_a_fresh_model(base, tmp_path):
    file = models.smollm2_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    model = models.twin(base)
    with torch.no_grad():
        before = model(input_ids=ids, labels=ids).loss.item()
    torch.manual_seed(0)
    models.ours(model, models.SMOLLM2_ADAPTER, seed=0).train()
    optimizer = torch.optim.AdamW(vblora.parameter_groups(model, lr_bank=3e-3, lr_logits=1e-2))
    losses = []
    for _ in range(8):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = torch.stack(losses).tolist()
    assert after[-1] < 0.75 * before, (before, after)

    vblora.save(model, tmp_path)
    fresh = vblora.load(models.twin(base), tmp_path)
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
        assert torch.equal(fresh.eval()(input_ids=ids).logits, trained)
        with vblora.disabled(model):
            assert model(input_ids=ids, labels=ids).loss.item() == before


def test_rows_with_adapters_of_their_own(base, tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    serving.write_adapters(base, folder, 3)
    bank = tmp_path / "bank.safetensors"
    model = models.twin(base)
    AdapterStore(model, folder, bank=bank, exact=True)
    names = ["0", None, "2", "0", "1"]
    ids = torch.randint(3, 500, (5, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, :7] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    choice = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
        tokens = model.generate(**batch, **choice, adapter_names=names)
        for row, name in enumerate(names):
            alone = models.twin(base)
            if name is not None:
                vblora.load(alone, folder / name, bank=bank)
            expected = alone(**batch).logits[row]
            if name is None:
                assert torch.equal(mixed[row], expected)
            else:
                seen = mask[row] == 1  # what padding computes is noise
                assert relative_error(mixed[row, seen], expected[seen]) < 1e-6
                assert relative_error(base(**batch).logits[row], expected) > 1e-3
            assert torch.equal(tokens[row], alone.generate(**batch, **choice)[row])
