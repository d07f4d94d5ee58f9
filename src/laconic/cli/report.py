"""What was done to a saved model."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from .. import checkpoint
from ..errors import CheckpointError, CheckpointNotFoundError
from ..report import CompactReport, render
from .shared import show_json, show_report


def report(directory: Positional[Path], html: Path | None = None, json: bool = False) -> None:
    """Show what was done to a saved model.

    Example: laconic report laconic-demo/model --html report.html

    Args:
        directory: a saved model.
        html: also write the HTML page here (needs the extra `plot`).
        json: print the report as JSON.
    """
    if not directory.is_dir():
        raise CheckpointNotFoundError(f"{directory} does not exist or is not a directory: expected a saved model")
    manifest = checkpoint.read_manifest(directory)
    if "report" not in manifest:
        raise CheckpointError(f"{directory} was saved without a report: laconic.save(model, directory, report=report)")
    try:
        found = CompactReport.from_json(manifest["report"])
    except (KeyError, TypeError, ValueError, AttributeError):
        if json and html is None:
            show_json(manifest["report"])
            return
        raise CheckpointError(
            f"{directory}: its report is not what compact() or compress() returned, but data of your own: --json prints it"
        ) from None
    if html is not None:
        checkpoint.check_place(html)
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(render(found, title=manifest["model"], context={"laconic": manifest["laconic"], "torch": manifest["torch"]}))
    if json:
        show_json(manifest["report"])
        return
    show_report(found)
    print(f"parameters {found.params_before:,} -> {found.params_after:,}")
