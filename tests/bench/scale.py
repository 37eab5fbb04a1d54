# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What backups of very many machines take: a simulation, from what one was measured to take.

Usage: scale.py [--domains N] [--hosts N] [--gib N] [--change PERCENT] [--json]

Each backup is a flow that takes of several resources at once: its host's disks, CPUs and line, and the store's line,
CPUs and disks. Flows share what there is fairly, and no resource is used beyond what it has. A host runs so many
backups at a time, and begins the next when one ends.
"""

import argparse
import collections
import json

GIB = 1 << 30

# CPU seconds for a GiB: see "Cost model" in README.md beside this. ssh: aes128-gcm, one side.
QEMU, READ, PACK, LZ4, SSH = 0.55, 0.30, 0.45, 1.0, 0.9
START_SECONDS = 0.5  # of a backup before and after its data: processes, libvirt's job, sync, commit
START_CPU = 0.6
SHRINKS_TO = 0.5  # by lz4: what programs, text and zeroes of the benchmark do
# Of one host, and of the store. A line of 10 Gbit/s carries 1.1 GiB/s of TCP; disks in GiB/s and in reads a second.
CPUS, LINE, DISK, IOPS = 8, 1.1, 3.0, 100_000
STORE_CPUS, STORE_LINE, STORE_DISK = 16, 1.1, 2.0
PIECE = 64 << 10  # bytes: an increment is read in these, a full backup in requests of 512 KiB
REQUEST = 512 << 10
# Memory of the stages of one backup, MiB: checkpoint and its keeper, extents, read, pack, ssh; and on the store.
HOST_MIB, STORE_MIB = 2 * 35 + 22 + 25 + 25 + 8, 25 + 12
HOST_PROCESSES, STORE_PROCESSES = 7, 4


def needs(host, store, full, packed):
    """{resource: units for each GiB of data} of a backup."""
    sent = SHRINKS_TO if packed else 1.0
    return {
        (host, "CPUs"): QEMU + READ + PACK + (LZ4 if packed else 0) + SSH * sent,
        (host, "line"): sent,
        (host, "disks"): 1.0,
        (host, "reads"): GIB / (REQUEST if full else PIECE),
        (store, "CPUs"): (SSH + PACK) * sent,
        (store, "line"): sent,
        (store, "disks"): sent,
        # One stage after the other has the data: no backup is faster than the slowest of them.
        (object(), "its own stages"): max(QEMU, READ, PACK + (LZ4 / 2 if packed else 0), SSH * sent),
    }


CAPACITY = {"host": {"CPUs": CPUS, "line": LINE, "disks": DISK, "reads": IOPS},
            "store": {"CPUs": STORE_CPUS, "line": STORE_LINE, "disks": STORE_DISK}}


def capacity(resource):
    """Units a second of a resource: (place, kind)."""
    place, kind = resource
    return 1.0 if kind == "its own stages" else CAPACITY[place[0]][kind]


def rates(flows):
    """
    {flow: GiB a second} and {flow: what holds it back}, as shared fairly.

    flows: {flow: {resource: units for each GiB}}. All grow at the same rate until a resource is used up; those that
    need it stop there, and the others go on.
    """
    free = collections.defaultdict(float)
    growing = dict(flows)
    for demand in flows.values():
        for resource in demand:
            free[resource] = capacity(resource)
    rate, held = dict.fromkeys(flows, 0.0), {}
    while growing:
        demand = collections.Counter()
        for wanted in growing.values():
            demand.update(wanted)
        step, tightest = min((free[resource] / units, number, resource)
                             for number, (resource, units) in enumerate(demand.items()))[::2]
        for resource, units in demand.items():
            free[resource] -= step * units
        for flow in growing:
            rate[flow] += step
        for flow in [flow for flow in growing if tightest in growing[flow]]:
            held[flow] = tightest
            del growing[flow]
    return rate, held


def simulate(jobs, at_once, full, packed, stores=1):
    """
    Run backups: jobs {host number: [GiB of each]}; at_once of each host's at a time. Returns a dict.

    hours (float): until the last has ended. limits: {resource: share of the time in which it held most of them back}.
    """
    waiting = {host: collections.deque(sizes) for host, sizes in jobs.items()}
    left, flows, starting = {}, {}, []
    limits = collections.Counter()
    now, number, most = 0.0, 0, 0
    while any(waiting.values()) or left or starting:
        for host, sizes in waiting.items():
            active = sum(1 for other in [*left, *(flow for _, flow, _ in starting)] if other[0] == host)
            while sizes and active < at_once:
                starting.append((now + START_SECONDS, (host, number), sizes.popleft()))
                number += 1
                active += 1
        most = max(most, len(left) + len(starting))
        rate, held = rates(flows)
        ends = [left[flow] / rate[flow] for flow in left]
        step = min([*ends, *(when - now for when, _, _ in starting)])
        if held:
            kind = collections.Counter(f"{place[0]}'s {kind}" if isinstance(place, tuple) else "its own stages"
                                       for place, kind in held.values()).most_common(1)[0][0]
            limits[kind] += step
        now += step
        for flow in list(left):
            left[flow] -= step * rate[flow]
            if left[flow] < 1e-9:
                del left[flow], flows[flow]
        for item in [item for item in starting if item[0] <= now + 1e-9]:
            starting.remove(item)
            _, flow, size = item
            left[flow] = size
            flows[flow] = needs(("host", flow[0]), ("store", flow[0] % stores), full, packed)
    return {"hours": now / 3600, "at_once": most, "limits": {kind: seconds / now for kind, seconds in limits.items()}}


def scenarios(domains, hosts, gib, change):
    """Yield (what, dict of simulate()'s parameters)."""
    each = domains // hosts
    night = {host: [gib * change / 100] * each for host in range(hosts)}
    whole = {host: [gib] * each for host in range(hosts)}
    one = {0: [gib] * each}
    for at_once in (1, 2, 4, 8):
        yield f"a night's increments, {at_once} at a time on each host", {"jobs": night, "at_once": at_once}
    yield "the same with -z", {"jobs": night, "at_once": 2, "packed": True}
    yield "fulls of one host, the morning after", {"jobs": one, "at_once": 4, "full": True}
    yield "the same with -z", {"jobs": one, "at_once": 4, "full": True, "packed": True}
    yield "fulls of all", {"jobs": whole, "at_once": 2, "full": True}
    yield "the same with -z", {"jobs": whole, "at_once": 2, "full": True, "packed": True}
    yield "the same with -z, four stores", {"jobs": whole, "at_once": 2, "full": True, "packed": True, "stores": 4}


def main():
    parser = argparse.ArgumentParser(prog="scale")
    parser.add_argument("--domains", type=int, default=1000)
    parser.add_argument("--hosts", type=int, default=20)
    parser.add_argument("--gib", type=float, default=100, help="of data in each")
    parser.add_argument("--change", type=float, default=2, metavar="PERCENT", help="of it a day")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for what, how in scenarios(options.domains, options.hosts, options.gib, options.change):
        found = simulate(**{"full": False, "packed": False, **how})
        busy = found["at_once"] / len(how["jobs"])
        rows.append({
            "what": what, "hours": round(found["hours"], 2), "at_once": found["at_once"],
            "host_mib": round(busy * HOST_MIB), "store_mib": found["at_once"] * STORE_MIB,
            "host_processes": round(busy * HOST_PROCESSES), "store_processes": found["at_once"] * STORE_PROCESSES,
            "limits": {kind: round(share, 2) for kind, share in found["limits"].items() if share >= 0.05},
        })
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'':52}{'hours':>7}{'at once':>9}  a host: MiB, processes  the store: the same  held back by")
    for row in rows:
        limits = ", ".join(f"{kind} {share:.0%}" for kind, share in row["limits"].items())
        print(f"{row['what']:52}{row['hours']:>7.2f}{row['at_once']:>9}{row['host_mib']:>14}{row['host_processes']:>11}"
              f"{row['store_mib']:>15}{row['store_processes']:>6}  {limits}")


if __name__ == "__main__":
    main()
