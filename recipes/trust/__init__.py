"""What faults.py does to runs, and how it starts and judges them."""
