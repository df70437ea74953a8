"""`python -m benchmarks`: measure, print and write `benchmarks/results/cpu.json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import int8pass
from benchmarks import cpu
from int8pass import measure

PARTS = {"quality": cpu.quality, "calibrated": cpu.calibrated, "speed": cpu.speed, "profile": cpu.profile}


def main() -> None:
    parser = argparse.ArgumentParser(description=cpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part of it")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/cpu.json"), help="JSON to write or complete"
    )
    arguments = parser.parse_args()
    report: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name, part in PARTS.items():
        if arguments.only not in (None, name):
            continue
        report[name] = {
            **part(),
            "device": measure.device_name(torch.device("cpu")),
            "torch": torch.__version__,
            "int8pass": int8pass.__version__,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps({name: report[name]}, indent=1))


if __name__ == "__main__":
    main()
