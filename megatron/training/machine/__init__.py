"""What a run sets on a machine of CPUs before it trains: cores, memory, matrix products."""
