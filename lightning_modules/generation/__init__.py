"""Text from a model, a token at a time: one state, constant memory, any mitigation (docs/generation.md)."""
