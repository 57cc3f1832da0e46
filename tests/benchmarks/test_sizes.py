"""``python benchmarks/sizes.py`` runs, and its forms are as large as they should be."""

import sys
from dataclasses import replace

from benchmarks import sizes


def test_prints_each_form(monkeypatch, capsys):
    title, targets, config = sizes.minilm()
    one_block = title, targets[:6], config
    monkeypatch.setattr(sizes, "minilm", lambda: one_block)
    # With candidates: of 300 vectors, each row has 128.
    monkeypatch.setattr(sizes, "llama", lambda: (title, targets[:2], replace(config, num_vectors=300)))
    monkeypatch.setattr(sys, "argv", ["sizes.py"])
    sizes.main()
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.count("|") == 4]
    share = {name: float(percent.rstrip("%")) for name, _, percent in lines[-9:]}
    shared, small, deploy = (
        share[f"deploy{more}"] for more in (", bank in a file that adapters share", ", bank in int8", "")
    )
    assert shared < small < deploy < share["resume"] < share["PEFT"] == 100 < share["LoRA r=8, float32"]
