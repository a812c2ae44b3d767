"""Faults on a seeded schedule, over sweeps of tiny trials; what a sweep promises is checked after each."""
