"""How checkpoints of each family are built: one file of tables each, found by itself.

A file defines `FAMILIES` (name -> `networks.Family`) and, for spellings of its own, `PREFIXES`.  It may be there before its
family is: rows are run for the families that the converter has, and a family of the converter without rows fails.
"""

from __future__ import annotations

import importlib
import pkgutil

from networks import Family, Prefix

FAMILIES: dict[str, Family] = {}
PREFIXES: dict[str, Prefix] = {}
for _found in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_found.name}")
    _prefixes = getattr(_module, "PREFIXES", {})
    assert FAMILIES.keys().isdisjoint(_module.FAMILIES), _found.name
    assert PREFIXES.keys().isdisjoint(_prefixes), _found.name
    FAMILIES |= _module.FAMILIES
    PREFIXES |= _prefixes
