"""What `kernels.bench`, `kernels.warmup` and `kernels.aot` run: shapes, operators, peers, timing."""
