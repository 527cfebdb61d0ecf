"""The verb: directories and measurements in, one HTML file out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatepress.bench import render
from gatepress.config import refuse_single
from gatepress.errors import UsageError
from gatepress.files import replace_file
from gatepress.report import facts, page

SUFFIXES = (".html", ".htm")


def report(
    directories: Sequence[str | Path],
    output: str | Path,
    *,
    benches: Sequence[str | Path] = (),
    title: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the page of runs, pruned and ONNX directories and sweeps, with the records of `benches` beside them.

    Returns what was written and what it says; docs/json-contract.md lists it. Raises `UsageError` on a name
    that is not a page's, `OutputError` if `output` exists and not `force`, `ArtifactError` on input that is not
    understood.
    """
    output = Path(output)
    refuse_single(directories=directories, benches=benches)
    if not directories:
        raise UsageError("nothing to report: give a directory of gatepress train, prune, export or sweep")
    render.check_file(output, SUFFIXES, "--output", force=force)
    measured = [(path, render.read(path)) for path in map(Path, benches)]
    sheet = facts.read([Path(one) for one in directories], measured)
    drawn = page.render(sheet, title)
    # Names are hostile: a lone surrogate is not UTF-8, but it can be a character reference.
    replace_file(output, drawn.html.encode("utf-8", "xmlcharrefreplace"))
    return {
        "output": str(output),
        "title": drawn.title,
        "finding": drawn.finding,
        "sections": drawn.sections,
        "models": [_told(item) for item in sheet.items],
    }


def _told(item: facts.Item) -> dict[str, Any]:
    """Return the numbers of one model under the keys of the other commands."""
    return {
        **{key: getattr(item, key) for key in ("name", "kind", "task", "metric_name")},
        "metric_value": item.metric,
        **{key: getattr(item, name) for name, key in facts.COUNTED.items()},
        "size_bytes": item.size_bytes,
    }
