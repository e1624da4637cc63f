"""The commands: python -m runtime, or r2-edge where the runtime's wheel is installed.

`python -m runtime generate …` is `python -m runtime.generate …`.
"""

import difflib
import importlib.util
import runpy
import sys
from pathlib import Path

from runtime.cli import table, version
from runtime.errors import UsageError

COMMANDS = {
    "generate": "draw images: labels, sizes, steps, guidance, seed",
    "render": "draw any size or crop of what generate --state has kept",
    "resample": "take an image through a latent to another size",
    "inspect": "what a bundle holds, and whether its files are whole",
    "certify": "does this machine draw what it should, in every precision and at every size?",
    "doctor": "what this machine can run, what to install, what to type next",
}
MORE = {
    "serving": "a server of pictures: OpenAI's and A1111's interfaces, a page",
    "export": "checkpoint → bundle",
    "export.to_plan": "graphs → TensorRT plans",
    "export.wheel": "the runtime and a bundle as one wheel",
    "calibration": "8-bit forms of a bundle's graphs",
    "calibration.report": "what each precision costs",
    "calibration.half": "fp16 and bf16 forms of a bundle's graphs",
    "reference.train": "images → checkpoint",
    "reference.evaluate": "what a checkpoint is worth",
    "reference.published": "checkpoints of published code → ours",
}


def main() -> None:
    """Run the command that is named first, or list them all."""
    own = called()
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(listed())
    elif name == "--version":
        print(version())
    elif name in COMMANDS:
        sys.argv = [name, *rest]
        runpy.run_module(f"runtime.{name}", run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f"; the nearest is {near[0]}" if near else ""
        if name in MORE:
            place = "it is" if installed(name) else "it is in a clone of the repository, as"
            meant = f"; {place} python -m {name}"
        print(f"{own}: error: no command {name}{meant}. Help: {own} -h", file=sys.stderr)
        sys.exit(UsageError.exit_code)


def called() -> str:
    """What the user typed to come here."""
    name = Path(sys.argv[0]).stem
    return name if name == "r2-edge" else "python -m runtime"


def installed(name: str) -> bool:
    """Whether one of MORE is here; the runtime's wheel has none of them."""
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def listed() -> str:
    """Every command that is installed here, a line each."""
    own = called()
    rows = [[f"{own} {name}", text] for name, text in COMMANDS.items()]
    rows += [[f"python -m {name}", text] for name, text in MORE.items() if installed(name)]
    first = f"{own} generate --label 7"
    return f"{version()}\n\n{table(rows)}\n\nEach has --help. A first picture: {first}"


if __name__ == "__main__":
    main()
