"""Views of a stored tensor as a stack of matrices, and the choice of the view for a route."""

from symlm.views.matrix_view import MatrixView
from symlm.views.storage import STACK, TRANSPOSED, TRANSPOSED_STACK, VECTOR, WHOLE, view_of

__all__ = ["STACK", "TRANSPOSED", "TRANSPOSED_STACK", "VECTOR", "WHOLE", "MatrixView", "view_of"]
