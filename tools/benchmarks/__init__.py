"""One module for each subcommand of tools/benchmark.py, and what they share: rows, alternating workers."""
