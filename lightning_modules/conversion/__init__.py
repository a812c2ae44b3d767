"""Checkpoints between layouts: ours, state-spaces, Hugging Face."""
