"""Torture as a habit: random networks, kills, mutated files, budgets; `python -m tests.torture --help`."""
