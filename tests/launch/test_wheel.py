"""A built wheel holds all that the checkout holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_wheel_holds_conf_and_every_module(tmp_path):
    """Built without isolation, from a copy, so that neither the network nor the checkout is touched."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("scale_llm", "conf", "slurm", "pyproject.toml", "setup.py", "README.md"):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-r", str(ROOT / name), str(copy)], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"scale_llm_conf/{path.relative_to(ROOT / 'conf')}" in held
    for path in (ROOT / "slurm").iterdir():
        assert f"scale_llm_slurm/{path.name}" in held
    for path in (ROOT / "scale_llm").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in held

    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    script = "import sys; from scale_llm.config.store import conf_dir; print(conf_dir()); "
    script += "from scale_llm.launch.cli import main; main(sys.argv[1:])"
    result = subprocess.run(
        [sys.executable, "-c", script, "--check", "experiment=demo_pretrain"],
        capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{installed}/scale_llm_conf\n") and "5,048,576" in result.stdout
