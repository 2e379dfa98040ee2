"""What the optimizer stores: loading it by name, checks before a step, and the parameters of ZeRO's partitions."""
