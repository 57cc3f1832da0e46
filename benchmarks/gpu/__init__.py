"""`make gpu-check`: what one GPU can tell of this library within about nine minutes, offline. docs/gpu.md has the phases."""

from pathlib import Path

ROOT = Path(__file__).parents[2]

PHASES = {  # and the seconds that each may take
    "facts": 15,
    "build": 70,
    "operators": 90,
    "hazards": 40,
    "sanitizer": 70,
    "times": 100,
    "counters": 75,
    "training": 100,
}
