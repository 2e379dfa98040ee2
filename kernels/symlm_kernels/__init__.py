"""Newton–Schulz building blocks: pure torch twins today, one signature for every backend."""
