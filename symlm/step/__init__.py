"""From gradients to directions: phases 1 and 2 of a step, for one rank and for many."""
