"""Synthetic tasks: a small file a family, one protocol (`data.tasks.task`) for all."""
