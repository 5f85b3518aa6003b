# shellcheck shell=bash
# The body of every job: sourced by train.sbatch and by <run_dir>/job.sbatch, which set
#   python   the interpreter that has scale_llm       scripts   this directory       run_dir   what to run
# The flow: environment; then, until it ends: refuse or record this start, check the nodes, one srun task for each
# rank, start again here, requeue or end.
# SC2154: these three come from the script that sources this one
# shellcheck disable=SC2154

# Slurm sends TERM to this script together with the ranks (preemption, scontrol requeue). It must outlive them to ask
# for its requeue. CONT comes with it and is not trapped: bash loses one of two trapped signals that arrive together.
trap ':' TERM

# shellcheck source=slurm/env.sh
. "$scripts/env.sh"
job=("$python" -m scale_llm.launch.slurm.job)

meeting=${MASTER_ADDR:-}

while true; do
    "${job[@]}" begin "$run_dir" || exit 1
    status=0
    "${job[@]}" preflight "$run_dir" || status=$?
    if ((status == 0)); then
        # The nodes that are fit, those of the job but for spare and bad ones; the first is where ranks meet
        options=$("${job[@]}" options "$run_dir") || exit 1
        mapfile -t options <<<"$options"
        export MASTER_ADDR=${meeting:-${options[0]}}
        export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
        # --wait: once a rank has ended, the others have half a minute; ranks that ended well have then long ended too.
        # (--kill-on-bad-exit would kill ranks that are about to ask for a requeue because one has just done so.)
        srun --wait=30 "${options[@]:1}" "${job[@]}" rank "$run_dir" &
        ranks=$!
        # A trapped signal ends `wait` early: wait again until srun itself has ended
        while kill -0 "$ranks" 2>/dev/null; do wait "$ranks" || true; done
        wait "$ranks" || status=$?
    fi
    end=0
    "${job[@]}" end "$run_dir" "$status" || end=$?
    # 77, AGAIN_HERE of scale_llm/config/exit_status.py: the ranks have failed, and the job has nodes for another start
    ((end == 77)) || exit "$end"
done
