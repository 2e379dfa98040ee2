"""Everything that is exchanged between ranks: ownership, layouts, exchanges, and the partitions of DeepSpeed's ZeRO.

No other package imports torch.distributed.
"""
