"""How long a step is: the scale of a direction by its shape, and what a step may do to the weight's size."""
