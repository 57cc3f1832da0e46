"""``python benchmarks/sizes.py`` runs, and its forms are as large as they should be."""

import sys

from benchmarks import sizes


def test_prints_each_form_of_an_encoder_s_adapter(monkeypatch, capsys):
    monkeypatch.setattr(sizes, "llama", sizes.minilm)  # a large model takes as long as it is large
    monkeypatch.setattr(sys, "argv", ["sizes.py"])
    sizes.main()
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.count("|") == 4]
    share = {name: float(percent.rstrip("%")) for name, _, percent in lines[2:11] if percent.endswith("%")}
    shared, small, deploy = (
        share[f"deploy{more}"] for more in (", bank in a file that adapters share", ", bank in int8", "")
    )
    assert shared < small < deploy < share["resume"] < share["PEFT"] == 100 < share["LoRA r=8, float32"]
