"""What moves between ranks: ownership, layouts, exchanges, ZeRO partitions. Nothing else imports torch.distributed."""
