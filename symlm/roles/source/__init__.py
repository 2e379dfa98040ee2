"""What the source of a class says: what it calls, and what it does to the outputs of a layer."""
