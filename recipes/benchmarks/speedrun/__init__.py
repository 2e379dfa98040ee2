"""The optimization track of modded-nanogpt: steps to a validation loss of 3.28, on its model, text and rules."""
