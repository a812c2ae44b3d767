"""What `lightning_modules.evaluate` measures, in memory that is flat in length."""
