"""QK-clip: after a step, the queries and keys of heads whose attention logits passed a threshold are scaled back."""

from symlm.qk_clip.clip import QKClip
from symlm.qk_clip.logits import largest_logits

__all__ = ["QKClip", "largest_logits"]
