"""What a task is, as rows of data, and where its rows of text come from. Standard library only.

`gatepress.tasks.sources` loads the rows; it needs the `datasets` package and is imported on use.
"""

from gatepress.tasks.spec import TASKS, TaskSpec, task_named

__all__ = ["TASKS", "TaskSpec", "task_named"]
