"""What mitigations need to know of a checkpoint: measured on held-out text, kept in a file beside it."""
