#!/usr/bin/env bash
# Are these nodes fit for a job? Inside an allocation:    bash slurm/preflight.sh RUN_DIR [GPUS_PER_NODE]
#
# On every node: as many GPUs as asked for, no uncorrected ECC errors, no clocks held down by heat or power, free space
# in RUN_DIR. Then an all-reduce over all nodes. Bad nodes are named, with how to leave them out, in the output and in
# RUN_DIR/bad_nodes; the exit status is then 1. job.sh runs this before the ranks start (cluster.preflight=false: not).
set -euo pipefail

FREE_GB=${PREFLIGHT_FREE_GB:-10}      # less is filled by the first checkpoints of all but toy models
SECONDS_TO_ANSWER=${PREFLIGHT_SECONDS:-120}
REDUCE=(-m scale_llm.launch.slurm.all_reduce)

check_gpus() { # check_gpus COUNT: prints what is wrong
    local found
    command -v nvidia-smi >/dev/null || { echo "no nvidia-smi where $1 GPUs are asked for"; return; }
    found=$(nvidia-smi -L | grep -c '^GPU ' || true)
    ((found >= $1)) || echo "$found GPUs where $1 are asked for"
    # Counted since the last reset of the GPU: an error that was not corrected has made wrong numbers
    nvidia-smi --query-gpu=index,ecc.errors.uncorrected.volatile.total --format=csv,noheader,nounits |
        awk -F', ' '$2 ~ /^[0-9]+$/ && $2 > 0 {print "GPU " $1 ": " $2 " uncorrected ECC errors"}' || true
    # A GPU that waits has low clocks and is well; one that is held down by heat or its power supply slows all the others
    local reasons=clocks_throttle_reasons
    nvidia-smi --query-gpu=index,$reasons.hw_slowdown,$reasons.hw_thermal_slowdown,$reasons.hw_power_brake_slowdown \
        --format=csv,noheader |
        awk -F', ' '/, Active/ {print "GPU " $1 ": its clocks are held down by the hardware"}' || true
}

check_disk() { # check_disk DIRECTORY
    local free
    free=$(df -Pk "$1" 2>/dev/null | awk 'NR == 2 {print int($4 / 1048576)}')
    [[ -n $free ]] || { echo "$1 is not there: does it lie on a file system that all nodes share?"; return; }
    ((free >= FREE_GB)) || echo "$free GB free in $1, $FREE_GB are asked for (PREFLIGHT_FREE_GB)"
    [[ -w $1 ]] || echo "$1 cannot be written"
}

check_node() { # what each node runs: one line, NODE ok or NODE bad REASON
    local wrong
    wrong=$( ((${2:-0} == 0)) || check_gpus "$2"; check_disk "$1")
    if [[ -z $wrong ]]; then echo "$SLURMD_NODENAME ok"; else echo "$SLURMD_NODENAME bad ${wrong//$'\n'/; }"; fi
}

on_every_node() { # one task a node; what goes wrong shows in what a node does not say
    # --wait: nodes that have answered do not end the others before their time
    srun --nodes="$count" --nodelist="$nodes" --ntasks="$count" --ntasks-per-node=1 --gpu-bind=none --kill-on-bad-exit=0 \
        --wait="$((SECONDS_TO_ANSWER + 30))" --quiet timeout "$SECONDS_TO_ANSWER" "$@" || true
}

judge() { # judge WHAT OUTPUT: prints what nodes said, collects the bad and the silent
    local node line reason
    for node in ${nodes//,/ }; do
        line=$(grep -m 1 "^$node " <<<"$2" || true)
        case $line in
            "$node ok"*) continue ;;
            "$node bad "*) reason=${line#"$node bad "} ;;
            *) reason="no answer in $SECONDS_TO_ANSWER s" ;;
        esac
        echo "preflight: $node: $1: $reason"
        bad+=("$node")
    done
}

if [[ ${1:-} == --node ]]; then check_node "$2" "${3:-0}"; exit; fi

run_dir=${1:?usage: preflight.sh RUN_DIR [GPUS_PER_NODE]} gpus=${2:-0}
nodes=${nodes:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)} # separated by commas
IFS=, read -ra each <<<"$nodes"
count=${#each[@]}
python=${python:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bad=()

judge "node" "$(on_every_node bash "$here/preflight.sh" --node "$run_dir" "$gpus")"
if ((${#bad[@]} == 0)); then # a sick node makes all others wait, so it is not asked to the reduction
    said=$(on_every_node "$python" "${REDUCE[@]}" "$gpus")
    judge "all-reduce" "$said"
    ((${#bad[@]})) || echo "preflight: $count nodes are fit; $(grep -m 1 -o 'reduced .*' <<<"$said")"
fi
((${#bad[@]})) || exit 0

names=$(IFS=,; echo "${bad[*]}")
echo "$names" >"$run_dir/bad_nodes"
if ((${#bad[@]} == count && count > 1)); then
    echo "preflight: all nodes are bad: look for what they share before you leave any out"
    exit 1
fi
cat <<EOF
preflight: leave out $names: a requeue by the job itself does; by hand
  scale-llm ... cluster.exclude=$names        or    sbatch --exclude=$names ...
  scontrol update NodeName=$names State=DRAIN Reason=preflight        (an administrator, for everybody)
EOF
exit 1
