"""Sweeps handed to machines other than this terminal: submit, follow, cancel. What they run is `orchestrate sweep`."""
