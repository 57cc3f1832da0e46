"""What a model and an adapter show of themselves."""

import re

import peft
import torch

import vblora
from tests.small_models import Net, bert

SIZES = {"num_vectors": 16, "vector_length": 8}


def test_the_line_of_trainable_parameters_is_pefts(capsys):
    model = vblora.inject(bert(), vblora.VBLoRAConfig(**SIZES, num_candidates=None, target_modules=["query", "value"]))
    vblora.print_trainable_parameters(model)
    ours = capsys.readouterr().out
    peft.get_peft_model(
        bert(), peft.VBLoRAConfig(**SIZES, target_modules=["query", "value"])
    ).print_trainable_parameters()
    theirs = capsys.readouterr().out.strip()
    assert ours.startswith(theirs + " || stored params: ")
    stored = vblora.count_parameters(model).stored
    assert ours.strip().endswith(f"stored params: {stored:,.0f} ({4 * stored:,.0f} bytes)")


def test_a_model_shows_ranks_and_which_adapter_is_active():
    net = vblora.inject(Net(blocks=2), vblora.VBLoRAConfig(r=3, **SIZES, target_modules=["up"], vblora_dropout=0.1))
    vblora.inject(net, vblora.LoraConfig(r=5, target_modules=["up"]), adapter_name="second")
    shown = " ".join(repr(net).split())
    # Once, because blocks are alike.
    assert shown.count("AdaptedLayer( default: r=3, dropout=0.1, active; second: r=5 (base_layer)") == 1
    assert len(re.findall(r"in_features=16, out_features=32", shown)) == 1
    assert repr(net.vblora.default).startswith("VBLoRAAdapter[active](") and "r=3" in repr(net.vblora.default)
    vblora.set_adapter(net, "second")
    assert repr(net.vblora.default).startswith("VBLoRAAdapter[inactive](")
    assert repr(net.vblora.second).startswith("LoRAAdapter[active](")
    vblora.merge(net)
    assert "default: r=3, dropout=0.1; second: r=5, active, merged" in repr(net)
    assert "[" not in repr(vblora.VBLinear(8, 8).adapter).partition("(")[0]
    torch.testing.assert_close(net(torch.zeros(1, 16)), net(torch.zeros(1, 16)))
