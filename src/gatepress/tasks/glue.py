"""GLUE rows: from a directory laid out `<task>/<split>.tsv`, or from the hub."""

from pathlib import Path

from gatepress.errors import DataError, HubError
from gatepress.hub import download
from gatepress.tasks.readers import Columns, read_columns

HUB_ID = "nyu-mll/glue"
_WAYS = "use --data-dir with a GLUE directory, --train-file and --validation-file with your own rows, or --task demo"


def glue_columns(directory: Path, task: str, split: str) -> tuple[str, Columns]:
    """Return the path and the columns of one split in `--data-dir`; `DataError` where it is not there."""
    path = directory / task / f"{split}.tsv"
    if not path.is_file():
        raise DataError(f"{path}: no such file; --data-dir is expected to hold {task}/{split}.tsv")
    return str(path), read_columns(path)


def hub_columns(task: str, split: str) -> tuple[str, Columns]:
    """Return the address and the columns of one split on the hub, or from its local cache.

    The parquet files are read as they are: `datasets.load_dataset` retries for half a minute where
    there is no network. Raises `HubError` that names the ways out where the hub is out of reach.
    """
    pattern = f"{task}/{split}-*.parquet"
    directory = download(HUB_ID, "dataset", (pattern,), ways_out=_WAYS)
    shards = sorted(directory.glob(pattern))
    if not shards:
        raise HubError(f"{HUB_ID}: {pattern} is not in the hub's cache, and the hub has not given it; {_WAYS}")
    parts = [read_columns(shard) for shard in shards]
    return f"{HUB_ID}/{task}/{split}", {name: [v for part in parts for v in part[name]] for name in parts[0]}
