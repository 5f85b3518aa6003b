"""How a checkpoint's writer process tells its rank what it wrote.

megatron-core starts a manager process for this, which takes a second and a half and 270 MB, and which stays behind for
ever where the rank is killed. A file does the same and leaves nothing but itself.
"""

import os
import pickle
import queue
import tempfile
from typing import Any


class ResultsFile:
    """A queue of one object from a forked process to its parent; the parent reads when the process has ended."""

    def __init__(self) -> None:
        handle, self._path = tempfile.mkstemp(prefix="scale_llm_results_")
        os.close(handle)

    def put(self, value: Any) -> None:
        with open(self._path, "wb") as file:
            pickle.dump(value, file)

    def get_nowait(self) -> Any:
        """Raises queue.Empty where the process ended before it wrote."""
        try:
            with open(self._path, "rb") as file:
                return pickle.load(file)  # our own process wrote it a moment ago
        except (EOFError, FileNotFoundError, pickle.UnpicklingError):
            raise queue.Empty from None
        finally:
            if os.path.exists(self._path):
                os.unlink(self._path)


def use_results_files() -> None:
    """Has megatron-core's checkpoint writer use files in place of its manager process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._get_write_results_queue = ResultsFile
