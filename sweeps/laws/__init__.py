"""Laws of capacity: the search for thresholds, fits to what it found, and their report."""
