# SPDX-License-Identifier: LGPL-2.1-or-later
"""The catalogs of a domain that a command can look into."""

from __future__ import annotations

from vnb.base import log
from vnb.base.errors import UsageError
from vnb.store import pruned
from vnb.store.catalog import Catalog, of_checkpoint
from vnb.virt import domxml
from vnb.virt.domain import Domain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any




def open_domain(args: Mapping[str, Any]) -> Domain:
    """The domain that the arguments name. Raises Error."""
    return Domain(args["--connect"], args["DOMAIN"], args["--user"], args["--password-file"])


class Catalogs:
    """
    All catalogs of a domain that we can look into: the set or destination that the arguments name,
    all destinations of the state directory, and those that its checkpoints were made for, though nothing was committed.

    saved, foreign: {restore point: (its catalog, its segment)} of this domain, and of others. pruned:
    restore points that vnb-prune dropped. abouts: {checkpoint: what it says of itself, or None where it is none of
    ours}. Raises Error.
    """

    def __init__(self, args: Mapping[str, Any], domain: Domain) -> None:
        state = args["--state-dir"]
        self.abouts = {name: domxml.about(xml) for name, xml in domain.checkpoints().items()}
        named = Catalog.of(state, domain.uuid, args["--set"], args["--destination"])
        all_ = [*([named] if named.directory else []), *Catalog.destinations(state, domain.uuid)]
        for about in self.abouts.values():
            if about and isinstance(about.get("destination"), str):
                all_.append(Catalog.of(state, domain.uuid, None, about["destination"]))
        self._by_id = {catalog.id: catalog for catalog in all_}
        self.saved: dict[str, Any] = {}
        self.foreign: dict[str, Any] = {}
        self._holds: dict[str | None, bool] = {}
        self.pruned: set[str] = set()
        for id_, catalog in self._by_id.items():
            segments = catalog.segments()
            for file in catalog.damaged:
                log.warn(file.line)
            if catalog.is_set and catalog.directory is not None:
                self.pruned |= pruned.pruned(catalog.directory)
            self._holds[id_] = any(segment.head["uuid"] == domain.uuid for segment in segments)
            for segment in segments:
                found = self.saved if segment.head["uuid"] == domain.uuid else self.foreign
                found.setdefault(segment.head["point"], (catalog, segment))

    def of(self, about: Mapping[str, Any]) -> Catalog | None:
        """The catalog that a checkpoint was made for, if it is one of these, or None."""
        return self._by_id.get(about.get("catalog"))

    def is_whole(self, about: Mapping[str, Any]) -> bool:
        """Whether the catalog that a checkpoint was made for is one of these, and nothing in it is damaged."""
        catalog = self.of(about)
        return catalog is not None and not catalog.damaged

    def holds_any(self, catalog: Catalog) -> bool:
        """Whether anything of the domain is saved there."""
        return self._holds[catalog.id]


def wanted(args: Mapping[str, Any], domain: Domain) -> Catalog:
    """The catalog that the arguments name; UsageError, with those that the domain has checkpoints of, where none is."""
    if not args["--set"] and not args["--destination"]:
        abouts = [domxml.about(xml) for xml in domain.checkpoints().values()]
        others = sorted({of_checkpoint(about) for about in abouts if about})
        there = f"there are checkpoints of {', '.join(others)}" if others else "there is no checkpoint of vnb"
        raise UsageError("--set", f"is needed, or --destination: {there}")
    return Catalog.of(args["--state-dir"], domain.uuid, args["--set"], args["--destination"])
