"""Log-probabilities of a reference that are kept in a file."""

from types import SimpleNamespace

import numpy as np

from scale_llm.stages.reference import _fingerprint


def test_other_answers_are_not_read_from_the_values_of_these(tmp_path):
    """The same rows, of which others are paired: KTO's mismatched answers depend on the rows' weights."""
    (tmp_path / "common.pt").write_bytes(b"weights")
    cfg = SimpleNamespace(model="model", precision="fp32", peft="none")
    run = SimpleNamespace(cfg=cfg, prepared=SimpleNamespace(path="preferences-1234"))
    names = [
        _fingerprint(run, tmp_path, SimpleNamespace(lengths=np.array(lengths)))
        for lengths in ([5, 7, 6, 8], [5, 7, 6, 8], [5, 7, 8, 6])
    ]
    assert names[0] == names[1] != names[2]
