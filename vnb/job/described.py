# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libvirt says of a domain, and what checkpoints of ours say of themselves."""

from vnb.virt import domxml


def abouts(domain):
    found = {name: domxml.about(xml) for name, xml in domain.checkpoints().items()}
    return {name: about for name, about in found.items() if about is not None}


def domain_fields(domain):
    fields = {"domain_xml": domain.xml(), "checkpoint_xml": None}
    if domain.is_persistent:
        fields["inactive_xml"] = domain.xml(inactive=True)
        fields["autostart"] = bool(domain.call("autostart"))
    return fields
