"""Averages over steps beside an optimizer: of the last weights, for evaluation, and of steps, as momentum."""

from symlm.averaging.ema_nesterov import EMANesterov
from symlm.averaging.tail import TailAverage

__all__ = ["EMANesterov", "TailAverage"]
