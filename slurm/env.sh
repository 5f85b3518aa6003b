# shellcheck shell=bash
# The environment of every rank. A variable that is set already stays as it is: export it before sbatch to overrule.
default() { [[ -n ${!1+set} ]] || export "$1=$2"; }

# ---- CUDA
# One hardware queue, so that collectives of tensor parallelism start before the kernels they overlap with.
default CUDA_DEVICE_MAX_CONNECTIONS 1
# Segments that grow in place: batches of changing lengths else end out of memory with gigabytes reserved and unused.
default PYTORCH_CUDA_ALLOC_CONF expandable_segments:True
# Numbers GPUs by bus, as nvidia-smi and the network cards do, not by speed: a rank's card is then the near one, and the
# GPU that preflight.sh names is the one that an administrator finds.
default CUDA_DEVICE_ORDER PCI_BUS_ID

# ---- NCCL
# Warnings name the broken link or card; INFO writes thousands of lines a node.
default NCCL_DEBUG WARN
# On a time-out every rank writes its last collectives, into the run directory rather than a node's /tmp: the rank whose
# list is one short is the one that hung.
default TORCH_FR_BUFFER_SIZE 2000 # before torch 2.9: TORCH_NCCL_TRACE_BUFFER_SIZE
default TORCH_NCCL_DUMP_ON_TIMEOUT 1
default TORCH_FR_DUMP_TEMP_FILE "${run_dir:-/tmp}/logs/nccl_trace_rank_"
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME are set for each rank, to the interface that leads to MASTER_ADDR
# (scale_llm/launch/environment.py): the libraries' own choice is a bridge of containers on some nodes, and a host name
# that resolves to 127.0.1.1 on others.

# ---- InfiniBand and RoCE
# A packet counts as lost after 4 us * 2^22 = 17 s (default 2^20: 4 s). A fabric that finds a way around a pulled cable
# takes longer than 4 s, and a packet that is lost for good ends the job.
default NCCL_IB_TIMEOUT 22
# Seven tries of that time are the most that the hardware counts.
default NCCL_IB_RETRY_CNT 7
# For your cluster to set: NCCL_IB_HCA (which cards: those of the storage network are to be left out),
# NCCL_IB_GID_INDEX=3 (RoCE v2), NCCL_IB_DISABLE=1 (to find out whether InfiniBand is what fails).

# ---- Python
# Lines appear when they are printed, not when a buffer is full: the last ones before a crash matter most.
default PYTHONUNBUFFERED 1
