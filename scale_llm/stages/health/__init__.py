"""What a run watches itself for: steps without a number, spikes, replicas that differ, slow ranks, hangs."""
