"""Where a sweep's studies live, who holds which lock, and what a study directory remembers."""
