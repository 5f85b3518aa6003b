"""slurm/preflight.sh with stand-ins for Slurm, nvidia-smi and df: which nodes are named, and for what."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "preflight.sh"

# srun calls its command once for each node, unless it would end slow nodes before their time
SRUN = """
while case $1 in -*) true ;; *) false ;; esac; do case $1 in --wait=*) wait=${1#*=} ;; esac; shift; done
[ "$wait" -gt "$2" ] || exit 1 # timeout and its seconds
for node in n1 n2 n3; do [ "$node" = "$SILENT" ] || SLURMD_NODENAME=$node "$@"; done
"""
SCONTROL = "printf '%s\\n' n1 n2 n3"
PYTHON = 'echo "$SLURMD_NODENAME ${SAID:-ok reduced 64 MiB over 3 nodes by nccl in 9 ms}"'
NVIDIA_SMI = """
case "$*" in
  -L) for i in 0 1; do echo "GPU $i: H100"; done ;;
  *ecc*) echo "0, 0"; echo "1, 0"; [ $SLURMD_NODENAME != "$ECC" ] || echo "1, 3" ;;
  *) echo "0, Not Active, Not Active, Not Active"
     [ $SLURMD_NODENAME != "$HOT" ] || echo "1, Not Active, Active, Not Active" ;;
esac
"""
DF = 'echo head; echo "disk 1 1 $(( ${FREE:-100} * 1048576 )) 1% /"'


@pytest.fixture
def preflight(tmp_path):
    """Runs the script in an allocation of three nodes with two GPUs each; the variables spoil something."""
    stand_ins = {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON, "nvidia-smi": NVIDIA_SMI, "df": DF}
    for name, text in stand_ins.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    def call(gpus: int = 2, **spoilt: str) -> tuple[int, str, str | None]:
        slurm = {"SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "n[1-3]", "python": str(tmp_path / "bin/python")}
        env = {**os.environ, **slurm, **spoilt, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        command = ["bash", str(SCRIPT), str(run_dir), str(gpus)]
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        bad = run_dir / "bad_nodes"
        return result.returncode, result.stdout + result.stderr, bad.read_text().strip() if bad.exists() else None

    return call


def test_fit_nodes(preflight):
    status, text, bad = preflight()
    assert (status, bad) == (0, None), text
    assert text == "preflight: 3 nodes are fit; reduced 64 MiB over 3 nodes by nccl in 9 ms\n"
    assert preflight(gpus=0)[0] == 0


@pytest.mark.parametrize(
    ("spoilt", "named", "reason"),
    [
        ({"ECC": "n2"}, "n2", "preflight: n2: node: GPU 1: 3 uncorrected ECC errors"),
        ({"HOT": "n3"}, "n3", "preflight: n3: node: GPU 1: its clocks are held down by the hardware"),
        ({"SILENT": "n1"}, "n1", "preflight: n1: node: no answer in 120 s"),
        ({"FREE": "3"}, "n1,n2,n3", "n2: node: 3 GB free"),
        ({"SAID": "bad Wrong: 7 of 9 sums"}, "n1,n2,n3", "n1: all-reduce: Wrong: 7 of 9 sums"),
        ({"ECC": "n1", "FREE": "3"}, "n1,n2,n3", "ECC errors; 3 GB free"),
    ],
)
def test_a_bad_node_is_named_with_its_reason(preflight, spoilt, named, reason):
    status, text, bad = preflight(**spoilt)
    assert (status, bad) == (1, named) and reason in text, text
    if named == "n1,n2,n3":
        assert "look for what they share" in text and "exclude" not in text
    else:
        assert f"cluster.exclude={named}" in text and "State=DRAIN" in text


def test_too_few_gpus(preflight):
    status, text, bad = preflight(gpus=8)
    assert (status, bad) == (1, "n1,n2,n3") and "2 GPUs where 8 are asked for" in text
