"""The report's tables, as the command prints them."""

from collections.abc import Mapping
from typing import Any

from runtime.cli import table

JUDGED = ("read right", "Fréchet distance", "precision", "recall")


def judgement_cells(found: Mapping[str, Any]) -> list[str]:
    """Cells under `JUDGED`, and of painted digits the share of hues as asked."""
    painted = [f"{found['hues_right']:.1%}"] if "hues_right" in found else []
    return [
        f"{found['read_right']:.1%}",
        f"{found['frechet']:.2f}",
        f"{found['precision']:.3f}",
        f"{found['recall']:.3f}",
        *painted,
    ]


def print_report(report: Mapping[str, Any]) -> None:
    """Every table that the report has measures for."""
    settings = report["settings"]
    if "reconstruction_mse" in report:
        print(f"\nR2IR reconstruction, {settings['test_images']} test images")
        for size, error in report["reconstruction_mse"].items():
            print(f"  {size:>6}  MSE {error:.4f}")
    if "generation" in report:
        print_generation(report)
    for size, curve in report.get("scale_consistency", {}).items():
        print(f"\na decode of {size} latents at k times 28 reduced by area, against one at 28")
        names = [f"{k:g} ({28 * k:g})" for k in curve["factor"]]
        psnr = [f"{value:.1f} dB" for value in curve["psnr"]]
        ssim = [f"{value:.3f}" for value in curve["ssim"]]
        print(table([("k", "PSNR", "SSIM"), *zip(names, psnr, ssim, strict=True)]))
    for size, curve in report.get("early_stop", {}).items():
        shares = ", ".join(f"{share:.0%}" for share in curve["read_right"])
        print(f"\nread right in the estimate of x0 after 1, 2, … evaluations at {size}: {shares}")
    print_likeness(report)


def print_generation(report: Mapping[str, Any]) -> None:
    """Judgements per size, the real digits' above them."""
    settings = report["settings"]
    print(
        f"\n{settings['digits_per_size']} digits a row, {settings['steps']} evaluations of "
        f"{settings['solver']} by {settings['drawn_by']}; the classifier reads "
        f"{report['classifier_accuracy']['test_images']:.1%} of the test images right"
    )
    real = report["real_digits"]["train"]
    painted = ("hues right",) if "hues_right" in real else ()
    rows: list[list[str]] = [["digits", "in training", *JUDGED, *painted]]
    rows.append(["real", "", *judgement_cells(real)])
    for name, found in report["generation"].items():
        seen = {True: "yes", False: "no", None: ""}[found["trained_on"]]
        rows.append([name, seen, *judgement_cells(found)])
    print(table(rows))


def print_likeness(report: Mapping[str, Any]) -> None:
    """How much alike the pictures of one seed are."""
    if "same_picture" in report:
        print("\nlikeness to the digits of the same seeds at the first size")
        for kind, sizes in report["same_picture"].items():
            for size, found in sizes.items():
                print(f"  {size:>6}  {kind:11}  {likeness(found)}")
    for sizes, stops in report.get("continued", {}).items():
        print(f"\nsteps at the first of {sizes}, and likeness to the second alone")
        for stop, found in stops.items():
            print(f"  {stop:>6}  {likeness(found)}, {found['seconds']:.3f} s a digit")


def likeness(found: Mapping[str, float]) -> str:
    return (
        f"correlation {found['correlation']:.3f}, PSNR {found['psnr']:.1f} dB, "
        f"{found['read_right']:.1%} read right"
    )
