"""Text and synthetic tasks -> token batches. Imports nothing."""
