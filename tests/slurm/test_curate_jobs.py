"""Curation as arrays of jobs: the output of a run without Slurm, also after jobs were cancelled in the middle."""

import json
import re
import sys
from pathlib import Path

import pytest
from support.slurm import wait_for

from scale_llm.config.curate_compose import compose_curation

pytest.importorskip("datatrove", reason="the packages of curation are not installed: pip install .[curate]")
pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT.parent / "shared" / "data" / "c4_web.jsonl"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    if not SOURCE.is_file():
        pytest.skip("real data ../shared/data/c4_web.jsonl is not here")
    folder = tmp_path_factory.mktemp("in")
    rows = SOURCE.read_text().splitlines(keepends=True)[:60]
    for number in range(3):
        (folder / f"{number}.jsonl").write_text("".join(rows[number * 20 : number * 20 + 25]))  # with copies
    few = ["curate.near.enabled=false", "curate.sentences.enabled=false"]  # an array of jobs takes seconds to begin
    return ["curate=duplicates", f"input={folder}", "curate.shard_megabytes=0.01", *few]


def _documents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "documents").iterdir())}


def test_jobs_give_what_a_run_here_gives(cluster, words: list[str], tmp_path: Path) -> None:
    from scale_llm.curate.run import curate

    curate(compose_curation([*words, f"output={tmp_path / 'here'}", "tasks=1"]), lambda _: None)
    output = tmp_path / "jobs"
    command = [
        sys.executable, str(ROOT / "tools" / "curate_data.py"), *words, f"output={output}", "tasks=2",
        "cluster=slurm", "cluster.time=10", "cluster.partition=batch", "cluster.cpus_per_task=1", "cluster.mem=1G",
    ]  # fmt: skip
    first = cluster.run(*command)
    assert first.returncode == 0, first.stderr
    jobs = re.findall(r"\d+", first.stdout.split("submitted jobs ")[1].split(";")[0])
    assert len(jobs) == 4
    completions = output / "work" / "logs" / "00-rules" / "completions"
    wait_for(lambda: completions.is_dir() and any(completions.iterdir()), 120, f"a task: {_logs(output)}")
    cluster.text("scancel", *jobs)
    wait_for(lambda: not cluster.text("squeue", "-h"), 60, "the queue to empty")
    assert not (output / "report.md").exists()
    again = cluster.run(*command)
    assert again.returncode == 0 and "going on in" in again.stdout, again.stderr
    wait_for((output / "report.md").exists, 240, f"the report: {_logs(output)}")
    assert _documents(output) == _documents(tmp_path / "here")
    assert json.loads((output / "report.json").read_text())["steps"]["exact"]["removed"]["copy"] > 0
    script = (output / "work" / "logs" / "00-rules" / "launch_script.slurm").read_text()
    for line in ("--partition=batch", "--time=10", "--mem=1G", "--cpus-per-task=1", "--array=0-"):
        assert f"#SBATCH {line}" in script
    assert not re.search(r"^#SBATCH --(qos|account)", script, re.MULTILINE)


def _logs(output: Path) -> str:
    return "".join(path.read_text()[-500:] for path in output.glob("work/logs/*/slurm_logs/*.out"))
