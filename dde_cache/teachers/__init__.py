"""Families of fusion encoders, one file each; `contract` says what a family tells, docs/how-to how to add one."""

from collections.abc import Mapping

from torch import nn

from dde_cache.teachers.blip import Blip
from dde_cache.teachers.bridgetower import BridgeTower
from dde_cache.teachers.contract import Family
from dde_cache.teachers.flava import Flava
from dde_cache.teachers.lxmert import Lxmert
from dde_cache.teachers.vilt import Vilt

FAMILIES: Mapping[str, type[Family]] = {family.name: family for family in (Vilt, BridgeTower, Blip, Flava, Lxmert)}
"""By the name that target specifications have, the model_type of their configurations."""

ARCHITECTURES: Mapping[str, tuple[type[Family], type[nn.Module]]] = {
    model.__name__: (family, model) for family in FAMILIES.values() for model in family.architectures
}
"""Family and model class by the name that a checkpoint gives."""
