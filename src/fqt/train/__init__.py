"""Training: tasks, models, the loop, checkpoints, and the comparison of recipes.

Recipes are names passed through to `fqt.nn`; nothing here knows a quantizer.
"""

from fqt.train.compare import Comparison, compare
from fqt.train.config import TrainConfig, preset_names, resolve
from fqt.train.models.images import MODELS, build_model
from fqt.train.results import RunResult, read_result
from fqt.train.run import Interrupted, train
from fqt.train.task import Metric, Task
from fqt.train.tasks import TASKS

__all__ = [
    "MODELS",
    "TASKS",
    "Comparison",
    "Interrupted",
    "Metric",
    "RunResult",
    "Task",
    "TrainConfig",
    "build_model",
    "compare",
    "preset_names",
    "read_result",
    "resolve",
    "train",
]
