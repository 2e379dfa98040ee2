"""What each parameter of a model is: every trainable one gets exactly one role, from structure first, names last."""

from symlm.roles.assignment import UnplacedParameters, assign_roles, place
from symlm.roles.role import Role, Site, whole_shape

__all__ = ["Role", "Site", "UnplacedParameters", "assign_roles", "place", "whole_shape"]
