"""How a stored tensor is a stack of matrices, and which view of it a route asks for."""

from symlm.views.matrix_view import MatrixView
from symlm.views.storage import STACK, TRANSPOSED, TRANSPOSED_STACK, VECTOR, WHOLE, view_of

__all__ = ["STACK", "TRANSPOSED", "TRANSPOSED_STACK", "VECTOR", "WHOLE", "MatrixView", "view_of"]
