"""What kills leave beside checkpoints."""

from scale_llm.checkpoint.retention import clear_remains


def test_remains_go_and_a_checkpoint_gets_its_name_back(tmp_path):
    for name in (
        ".iter_0000003.partial", ".iter_0000001.removed", "iter_0000002", ".iter_0000002.former",
        ".iter_0000004.former", "iter_0000005.damaged", ".other",
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    clear_remains(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".other", "iter_0000002", "iter_0000004", "iter_0000005.damaged"]
    assert (tmp_path / "iter_0000002" / "file").read_text() == "iter_0000002"
    assert (tmp_path / "iter_0000004" / "file").read_text() == ".iter_0000004.former"
    clear_remains(tmp_path / "nowhere")
