"""From directions to weights: phase 3 of a step."""
