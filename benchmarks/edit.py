"""How a digit is turned into another by its strength: python -m benchmarks.edit --data data/mnist

Test digits of one label are drawn again with another label, and read by the classifier that
`make evaluate` trains. By strength: the share that is read as the new label, the share still read
as the old one, and how far from their pictures (root mean square of pixels in [-1, 1]) the edits
are. Writes edit.json and edit.png: the digits, and a row per strength.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from calibration.digits import CLASSIFIER_SIDE, classifier
from runtime import cli
from runtime.bundle.files import atomic_write
from runtime.bundle.folders import make_folder
from runtime.bundle.manifest import DEFAULT_BUNDLE, Array
from runtime.engines import EngineOptions
from runtime.generate import checkpoint_of
from runtime.images.idx import read_idx
from runtime.images.pixels import contact_sheet, save_png, to_uint8
from runtime.pipeline.bundle import Bundle, open_bundle
from runtime.progress import Bar

STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
SEED = 1234
AT_ONCE = 20  # pictures
SHOWN = 10  # of each row


def digits(data: Path, label: int, count: int) -> Array:
    """The first test digits of a label, `[count, 1, 32, 32]` in [-1, 1], in a black margin."""
    images, labels = (read_idx(data / f"t10k-{n}-ubyte") for n in ("images-idx3", "labels-idx1"))
    margin = (CLASSIFIER_SIDE - images.shape[1]) // 2
    chosen = np.pad(images[labels == label][:count], ((0, 0), *[(margin, margin)] * 2))
    return (chosen[:, None] / 127.5 - 1).astype(np.float32)


def edited(bundle: Bundle, own: Array, label: int, strength: float, scale: float) -> Array:
    """Each picture drawn again as `label`, each with noise of its own."""
    made = []
    for first in range(0, len(own), AT_ONCE):
        init = own[first : first + AT_ONCE]
        options: dict[str, Any] = {"init": init, "strength": strength, "guidance_scale": scale}
        labels = [label] * len(init)
        made.append(bundle.generate(labels, seed=SEED, first_index=first, **options).images)
    return np.concatenate(made)


def turn(args: argparse.Namespace) -> None:
    """Edit at every strength, read, report."""
    reader = classifier(args.classifier)
    bundle = open_bundle(args.bundle, EngineOptions(threads=args.threads))
    own = digits(args.data, args.old, args.pictures)

    def share(images: Array, label: int) -> float:
        read = reader.run(["logits"], {"pixels": np.ascontiguousarray(images)})[0].argmax(1)
        return float((read == label).mean())

    rows, shown = [], [own[:SHOWN]]
    for strength in Bar(args.strengths, desc="edit", unit="strength"):
        made = edited(bundle, own, args.new, strength, args.guidance)
        shares = {f"read_{label}": share(made, label) for label in (args.new, args.old)}
        far = float(np.sqrt(np.square(made - own).mean()))
        rows.append({"strength": strength, **shares, "rms_from_picture": far})
        shown.append(made[:SHOWN])
    about = {
        "checkpoint": checkpoint_of(bundle),
        "provider": bundle.provider,
        "pictures": len(own),
        "guidance_scale": args.guidance,
        "picture_read_old": share(own, args.old),
        "rows": rows,
    }
    make_folder(args.out)
    with atomic_write(args.out / "edit.json") as file:
        file.write(json.dumps(about, indent=1).encode() + b"\n")
    sheet = contact_sheet(to_uint8(np.concatenate(shown)), SHOWN)
    save_png(args.out / "edit.png", sheet, {"rows": ["picture", *args.strengths]})
    table: list[list[object]] = [
        ["strength", f"read as {args.new}, %", f"as {args.old}, %", "rms from picture"]
    ]
    for row in rows:
        strength, new, old, far = row.values()
        table.append([strength, f"{100 * new:.1f}", f"{100 * old:.1f}", f"{far:.2f}"])
    print(cli.table(table))
    print(f"{args.out}: edit.json, edit.png (rows: the pictures, then each strength)")


def main() -> None:
    """The command line."""
    p = cli.parser("benchmarks.edit", __doc__)
    add = p.add_argument
    add("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE, help="its folder")
    add("--data", type=Path, default=Path("data/mnist"), help="MNIST's folder")
    reader = Path("build/evaluation/classifier.safetensors")
    add("--classifier", type=Path, default=reader, help="weights of the reader of digits")
    digit = cli.number(0, 9, int)
    add("--old", type=digit, default=3, help="the label of the pictures")
    add("--new", type=digit, default=8, help="the label that they are drawn with")
    strength = cli.number(0, 1)
    add("--strengths", type=strength, nargs="+", default=STRENGTHS, help="(0.5 to 0.95)")
    add("--guidance", type=cli.number(-100, 100), default=2.0, help="guidance_scale")
    add("--pictures", type=cli.number(1, 1000, int), default=200, help="per strength")
    add("--threads", type=cli.number(0, 1024, int), default=0, help="CPU threads (0: all cores)")
    add("--out", type=Path, default=Path("build/bench"), help="folder of the report")
    cli.run(turn, p)


if __name__ == "__main__":
    main()
