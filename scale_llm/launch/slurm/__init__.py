"""Runs as jobs of Slurm: the script and its submission, the steps inside the job, restarts and their limits."""
