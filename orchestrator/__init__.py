"""Sweep orchestration: plans, schedules, records, shows, chooses."""
