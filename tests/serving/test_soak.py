"""Many threads, random adapters and batches, evictions in both tiers, damaged folders: no row is wrong, and memory stays flat.

Takes seconds; VBLORA_SOAK_SECONDS=300 has it take five minutes.
"""

import os
import random
import shutil
import threading
import time
from pathlib import Path

import torch

from tests.small_models import relative_error
from vblora.serving import AdapterStore

SECONDS = float(os.environ.get("VBLORA_SOAK_SECONDS", "6"))
THREADS = 8
WARM_UP = 0.3  # share of the time after which memory must not grow any more


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_soak(world, tmp_path, one_thread):
    good = sorted(path.name for path in world.folder.iterdir())
    for name in good:
        shutil.copytree(world.folder / name, tmp_path / name)
    bad = {"cut off": 100, "scrambled": 3000}
    for name, length in bad.items():
        shutil.copytree(world.folder / "user-0", tmp_path / name)
        file = tmp_path / name / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:length])
    ids = torch.randint(3, 50, (4, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = {name: world.alone(name)(input_ids=ids).logits for name in (None, *good)}
    model = world.fresh()
    store = AdapterStore(model, tmp_path, bank=world.bank_file, exact=True, slots=5, capacity_bytes=30_000)
    wrong, batches, refused, memory = [], [0] * THREADS, [0] * THREADS, []
    end = time.monotonic() + SECONDS

    @torch.no_grad()
    def serve(number: int) -> None:
        torch.set_num_threads(1)
        chance = random.Random(number)
        while time.monotonic() < end and not wrong:
            names = [chance.choice([None, *good]) for _ in ids]
            faulty = chance.random() < 0.1
            if faulty:
                names[chance.randrange(len(names))] = chance.choice([*bad, "nobody"])
            try:
                found = model(input_ids=ids, adapter_names=names).logits
            except ValueError as error:
                refused[number] += 1
                if not faulty or "cannot be used" not in str(error):
                    wrong.append((names, error))
                continue
            batches[number] += 1
            errors = [relative_error(found[row], expected[name][row]) for row, name in enumerate(names)]
            if faulty or max(errors) > 2e-6 or any(name is None and errors[row] for row, name in enumerate(names)):
                wrong.append((names, errors))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.2)
        memory.append(resident_bytes())
    assert not wrong
    stats = store.stats()
    assert min(batches) > 0 and sum(refused) > 0
    assert min(stats["evictions_total"].values()) > 0
    assert stats["bytes"]["cold"] == sum(adapter.nbytes for adapter in store._cold.values()) <= 30_000
    settled = memory[int(WARM_UP * len(memory)) :]
    assert max(settled) - settled[0] < 50e6, "memory grows"
    print(
        f"{sum(batches)} batches, {sum(refused)} refused, {stats['evictions_total']} evictions, {max(memory) / 1e6:.0f} MB"
    )
