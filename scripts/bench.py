"""What guidance costs here, and whether it is right: time, memory and gradients, against a plain reading of the method.

    python scripts/bench.py [--quick] [--full-size] [--networks NAME ...] [--json] [--report FILE] [-- COMFYUI OPTIONS]
    python scripts/bench.py --presets [--seeds N ...] [--references NAME ...]

Without a graphics card: memory counted for full-size networks on tensors without values, and the rest on a toy. With
one: full-size networks with random weights on it, in fp16, bf16 and fp8, with dynamic VRAM and without. What fails, for
lack of memory or otherwise, is named, and the rest goes on. docs/BENCH.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmark import cases, presets, processes, report
from host.comfy_env import HOME, SetupError, leave, provision, rerun_in


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure what guidance costs on this machine.")
    parser.add_argument("--quick", action="store_true", help="only what takes seconds: no full-size weights")
    parser.add_argument("--full-size", action="store_true", help="SD1.5 in full on the processor too: many minutes")
    parser.add_argument("--cpu", action="store_true", help="leave a graphics card alone")
    parser.add_argument("--networks", nargs="+", choices=cases.FORMATS, default=(), help="only these")
    parser.add_argument("--json", action="store_true", help="print numbers for programs in place of tables")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a file to be pasted into the issue form")
    parser.add_argument("--presets", action="store_true", help="time and likeness of the presets, with the demo model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of --presets (default: 0 1)")
    parser.add_argument("--references", nargs="+", default=presets.REFERENCES, help="of --presets, by their names")
    parser.add_argument("arguments", nargs="*", metavar="COMFYUI OPTION", help="after --, for ComfyUI's command line")
    return parser.parse_args()


def card_is_there() -> bool:
    """Whether torch sees a graphics card."""
    import torch

    return torch.accelerator.is_available()


def tell(line: str) -> None:
    """Progress, beside what is printed at the end."""
    print(line, file=sys.stderr, flush=True)


def bench(options: argparse.Namespace) -> None:
    """Measure, and print or write what was found."""
    wanted = cases.chosen(options.quick, card_is_there() and not options.cpu, options.full_size, options.networks)
    HOME.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOME, prefix="bench-") as folder:
        machines, results = processes.run(wanted, Path(folder), options.arguments, tell)
    if options.report:
        options.report.write_text(report.as_issue(machines, results), encoding="utf-8")
    if options.json:
        print(json.dumps(report.as_json(machines, results), indent=1))
    else:
        print(report.as_text(machines, results), end="")


def main() -> None:
    """Provision, then run in the provisioned Python."""
    options = parse_arguments()
    env = provision()
    rerun_in(env, __file__, sys.argv[1:])
    if options.presets:
        presets.run(env.comfyui, options.seeds, options.references, options.json)
    else:
        bench(options)


if __name__ == "__main__":
    try:
        main()
    except (SetupError, OSError) as error:
        leave(error)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
