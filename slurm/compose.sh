# shellcheck shell=bash
# For sbatch by hand: finds the interpreter, composes the words of scale-llm in $words into a run, and becomes its job.
# Sourced by *.sbatch, which set scripts (this directory) and words.
# SC2154: these two come from the script that sources this one
# shellcheck disable=SC2154

python=${PYTHON:-$scripts/../.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    python=$(command -v python3) || { echo "error: PYTHON=: no Python found; set PYTHON=/path/to/python" >&2; exit 1; }
fi
# shellcheck disable=SC2034  # for job.sh
run_dir=$("$python" -m scale_llm.launch.slurm.job write "${words[@]}") || exit $?
# shellcheck source=slurm/job.sh
. "$scripts/job.sh"
