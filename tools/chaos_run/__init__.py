"""The parts of tools/chaos.py: the run that faults happen to, the faults, and what is told of them."""
