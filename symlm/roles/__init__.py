"""Roles of a model's parameters: each trainable one is assigned exactly one, from structure first and names last."""

from symlm.roles.assignment import UnplacedParameters, assign_roles, place
from symlm.roles.role import Role, Site
from symlm.roles.storage import whole_shape

__all__ = ["Role", "Site", "UnplacedParameters", "assign_roles", "place", "whole_shape"]
