"""How a checkpoint's writer process tells its rank what it wrote."""

import os
import pickle
import tempfile
from typing import Any


class ResultsFile:
    """One object from a forked process to its parent, which reads when the process has ended.

    A file, because a pipe would block the writer of a large object until somebody reads, and megatron-core's manager
    process takes a second and a half and 270 MB, and stays behind for ever where its rank is killed.
    """

    def __init__(self) -> None:
        handle, self._path = tempfile.mkstemp(prefix="scale_llm_results_")
        os.close(handle)

    def put(self, value: Any) -> None:
        with open(self._path, "wb") as file:
            pickle.dump(value, file)

    def get(self, otherwise: Any) -> Any:
        """otherwise: what to return where the process ended before it wrote."""
        try:
            with open(self._path, "rb") as file:
                return pickle.load(file)  # our own process wrote it a moment ago
        except (EOFError, FileNotFoundError, pickle.UnpicklingError):
            return otherwise
        finally:
            if os.path.exists(self._path):
                os.unlink(self._path)
