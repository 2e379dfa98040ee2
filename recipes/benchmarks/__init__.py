"""Programs that measure steps and runs."""
