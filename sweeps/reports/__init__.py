"""What a sweep has found, read back: tables, figures, a page, and the live table while it runs."""
