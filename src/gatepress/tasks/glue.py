"""GLUE rows: from a directory laid out `<task>/<split>.tsv`, or from the hub."""

from pathlib import Path

from gatepress.errors import DataError, HubError
from gatepress.hub import download
from gatepress.tasks.readers import Columns, read_columns

HUB_ID = "nyu-mll/glue"
_WAYS = "use --data-dir with a GLUE directory, --train-file and --validation-file with your own rows, or --task demo"


def glue_columns(directory: Path, task: str, split: str) -> tuple[str, Columns]:
    """Return the path and the columns of one split in `--data-dir`; `DataError` if it is not there."""
    path = directory / task / f"{split}.tsv"
    if not path.is_file():
        raise DataError(f"{path}: no such file; {_remedy(directory, task, split)}")
    return str(path), read_columns(path)


def _remedy(directory: Path, task: str, split: str) -> str:
    """Return what to do about a missing file; GLUE's own archives use other names (SST-2/dev.tsv)."""
    expected = f"--data-dir is expected to hold {task}/{split}.tsv"
    there = sorted(directory.iterdir()) if directory.is_dir() else []
    others = [one.name for one in there if one.is_dir() and one.name != task and _plain(one.name) == _plain(task)]
    if not others:
        return expected
    return f"{expected}, but holds {others[0]}; give its files with --train-file and --validation-file"


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def hub_columns(task: str, split: str) -> tuple[str, Columns]:
    """Return the address and the columns of one split on the hub, or from its local cache.

    The parquet files are read directly, because `datasets.load_dataset` retries for half a minute if
    there is no network. Raises `HubError` that names the ways out if the hub is out of reach.
    """
    pattern = f"{task}/{split}-*.parquet"
    directory = download(HUB_ID, "dataset", (pattern,), ways_out=_WAYS)
    shards = sorted(directory.glob(pattern))
    if not shards:
        raise HubError(f"{HUB_ID}: {pattern} is not in the hub's cache, and the hub has not given it; {_WAYS}")
    parts = [read_columns(shard) for shard in shards]
    return f"{HUB_ID}/{task}/{split}", {name: [v for part in parts for v in part[name]] for name in parts[0]}
