"""The arithmetic that a training spends its time in, written for the machine it runs on."""
