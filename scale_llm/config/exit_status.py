"""Exit statuses that mean more than success or failure."""

REQUEUE = 75
"""Stopped by a signal after a whole checkpoint: start me again. EX_TEMPFAIL of sysexits.h; every rank of a Slurm job
ends with it, srun hands it on, and the job script requeues the job."""

HUNG = 76
"""A rank has ended itself because the run made no progress; its log holds what every thread was doing."""

AGAIN_HERE = 77
"""To the job script: start the ranks again in this allocation."""
