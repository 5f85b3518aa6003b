"""What lies beside the tensors of a checkpoint."""

import json

import pytest

from scale_llm.checkpoint.writing import special_ids, write_tokenizer


@pytest.mark.parametrize("text", ["", "not json", "[1]", '"a"', b"\xff\xfe"])
def test_a_save_does_not_fail_for_what_lies_beside_the_tokenizer(tmp_path, text):
    """A config.json of another program, or a download that was cut."""
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "checkpoint").mkdir()
    write_tokenizer(tmp_path / "tokenizer.json", tmp_path / "checkpoint", None)
    assert special_ids([tmp_path]) == {}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 3], "x": 4}))
    assert special_ids([tmp_path, tmp_path / "model"]) == {"bos_token_id": 1, "eos_token_id": [2, 3]}
