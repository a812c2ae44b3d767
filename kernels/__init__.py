"""The maths of one layer: a folder an operator. Imports nothing: transformers executes a top-level package
of this name when it looks for its own `kernels`."""
