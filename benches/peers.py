#!/usr/bin/env python3
"""Part of benches/peers: takes results apart, and makes the tables and the plot of them.

    peers.py extract fio|holdfast|qemu SERIES FILE CPU-US [TRANSPORT | COUNT]
    peers.py together SERIES FILE...
    peers.py table DIR [--readme README.md]

`extract` prints lines for samples.tsv: series <tab> unit <tab> value; CPU-US is what was used of the processor, of the server
natively, and of the whole guest over verbs; `together` makes them of several results of `holdfast bench` that ran at the same time. `table` reads DIR/{native,verbs}/samples.tsv and
writes DIR/peers.md, DIR/peers.json and, if there is matplotlib, DIR/peers.png; --readme puts the first between the
markers of README.md and the plot beside it.

A figure is the median of its rounds. A ratio is that of two medians; its spread is the least and the most of the ratios of
single rounds, in which both took turns. (The example `local` tells ratios itself, of rates.)
"""

import json
import re
import shutil
import statistics
import sys
from collections import namedtuple
from pathlib import Path

BEGIN = "<!-- benches/peers: begin -->"
END = "<!-- benches/peers: end -->"

# What is compared: `aim` is the least ratio if it begins with >=, the most with <= or <.
Row = namedtuple("Row", "kind path ours unit against other aim")

BULK, SMALL = "1m, depth 8", "randread 4k, depth"
ROWS = [
    Row("verbs", "one-sided read, 1 MiB, depth 8", "endtoend/verbs/one-sided read 1 MiB depth 8", "MiB/s",
        "ib_read_bw", "ib_read_bw -s 1048576 -t 8", ">= 0.95"),
    Row("verbs", "read, 1 MiB, depth 8", f"holdfast verbs, read {BULK}", "MiB/s",
        "ib_write_bw", "ib_write_bw -s 1048576 -t 8", ">= 0.90"),
    Row("verbs", "write, 1 MiB, depth 8", f"holdfast verbs, write {BULK}", "MiB/s",
        "ib_read_bw", "ib_read_bw -s 1048576 -t 8", ">= 0.90"),
    Row("verbs", "one-sided read, 1 MiB, depth 8, one buffer", "endtoend/verbs/one-sided read 1 MiB depth 8, one buffer",
        "MiB/s", "ib_read_bw", "ib_read_bw -s 1048576 -t 8", ">= 0.95"),
    Row("verbs", "read, 1 MiB, depth 8, one buffer", "endtoend/verbs/read 1 MiB depth 8, one buffer", "MiB/s",
        "ib_write_bw", "ib_write_bw -s 1048576 -t 8", ">= 0.90"),
    Row("verbs", "write, 1 MiB, depth 8, one buffer", "endtoend/verbs/write 1 MiB depth 8, one buffer", "MiB/s",
        "ib_read_bw", "ib_read_bw -s 1048576 -t 8", ">= 0.90"),
    Row("verbs", "one-sided read, 1 MiB, depth 8", "endtoend/verbs/one-sided read 1 MiB depth 8", "MiB/s",
        "ib_read_bw, 8 buffers", "ib_read_bw -s 1048576 -q 8 -t 1", ""),
    Row("verbs", "read, 1 MiB, depth 8", f"holdfast verbs, read {BULK}", "MiB/s",
        "ib_write_bw, 8 buffers", "ib_write_bw -s 1048576 -q 8 -t 1", ""),
    Row("verbs", "write, 1 MiB, depth 8", f"holdfast verbs, write {BULK}", "MiB/s",
        "ib_read_bw, 8 buffers", "ib_read_bw -s 1048576 -q 8 -t 1", ""),
    Row("verbs", "one-sided read, 4 KiB, depth 1", "endtoend/verbs/one-sided read 4 KiB depth 1", "us",
        "ib_read_lat, its mean as ours", "ib_read_lat -s 4096, mean", "<= 1.15"),
    Row("verbs", "one-sided read, 4 KiB, depth 1", "endtoend/verbs/one-sided read 4 KiB depth 1", "us",
        "ib_read_lat, its typical one", "ib_read_lat -s 4096", ""),
]
for name in ("NFS/RDMA", "NVMe-oF/RDMA"):
    for depth in (1, 16):
        ROWS.append(Row("verbs", f"read, 4 KiB, depth {depth}", f"holdfast verbs, {SMALL} {depth}", "IOPS",
                        name, f"{name}, {SMALL} {depth}", ">= 2"))
for name in ("NFS/RDMA", "NVMe-oF/RDMA"):
    for way in ("read", "write"):
        ROWS.append(Row("verbs", f"{way}, 1 MiB, depth 8", f"holdfast verbs, {way} {BULK}", "MiB/s",
                        name, f"{name}, {way} {BULK}", ""))
for name in ("NFS/RDMA", "NVMe-oF/RDMA"):
    ROWS.append(Row("verbs", "CPU of the whole guest, read, 4 KiB, depth 16", f"holdfast verbs, {SMALL} 16, CPU", "us",
                    name, f"{name}, {SMALL} 16, CPU", ""))
for way in ("read", "write"):
    ROWS.append(Row("native", f"tcp {way}, 1 MiB, depth 8", f"holdfast tcp, {way} {BULK}", "MiB/s",
                    "iperf3, one stream, its default -l 128K", "iperf3 -l 128K", ">= 0.9"))
    ROWS.append(Row("native", f"tcp {way}, 1 MiB, depth 8", f"holdfast tcp, {way} {BULK}", "MiB/s",
                    "iperf3, one stream, -l 1M", "iperf3 -l 1M", ">= 0.9"))
ROWS += [
    Row("native", "tcp read, 1 MiB, depth 8", f"holdfast tcp, read {BULK}", "MiB/s",
        "nbdkit", f"nbdkit, read {BULK}", ""),
    Row("native", "tcp read, 4 KiB, depth 1", "endtoend/tcp/read 4 KiB depth 1", "us",
        "ping-pong of plain sockets, epoll", "ping-pong with epoll, 4 KiB", "<= 1.2"),
    Row("native", "tcp read, 4 KiB, depth 1", "endtoend/tcp/read 4 KiB depth 1", "us",
        "the same, blocking sockets", "ping-pong of blocking sockets, 4 KiB", ""),
    Row("native", "tcp read, 4 KiB, depth 1, by holdfast bench", f"holdfast tcp, {SMALL} 1, mean", "us",
        "ping-pong of plain sockets, epoll", "ping-pong with epoll, 4 KiB", ""),
    Row("native", "local read, 4 KiB", "local, read 4 KiB", "ns", "the file opened directly", "plain file, read 4 KiB", ">= 0.98"),
    Row("native", "local read, 1 MiB", "local, read 1 MiB", "ns", "the file opened directly", "plain file, read 1 MiB", ">= 0.98"),
    Row("native", "local read, 4 KiB, without its descriptor", "local socket, read 4 KiB", "ns",
        "the file opened directly", "plain file, read 4 KiB", ""),
    Row("native", "local read, 1 MiB, without its descriptor", "local socket, read 1 MiB", "ns",
        "the file opened directly", "plain file, read 1 MiB", ""),
]
for name in ("nbdkit", "NFS-Ganesha"):
    for depth in (1, 16):
        ROWS.append(Row("native", f"tcp read, 4 KiB, depth {depth}", f"holdfast tcp, {SMALL} {depth}", "IOPS",
                        name, f"{name}, {SMALL} {depth}", ""))
        ROWS.append(Row("native", f"CPU of the server, tcp read, 4 KiB, depth {depth}",
                        f"holdfast tcp, {SMALL} {depth}, CPU", "us",
                        name, f"{name}, {SMALL} {depth}, CPU", "< 1"))
# Over what many clients go, and how many.
CLIENTS = {"verbs": ("verbs", 8), "native": ("tcp", 64)}
for kind, path in (("verbs", "read, 4 KiB, 8 clients of 16, a process each"), ("native", "tcp read, 4 KiB, 64 clients of 16")):
    transport, count = CLIENTS[kind]
    one = f"holdfast {transport}, {SMALL} 16"
    ROWS.append(Row(kind, path, f"{one}, {count} clients", "IOPS", "1 client of 16", one, ">= 0.8"))
for transport in ("local", "tcp"):
    for way, block, depth, unit in (("randread", "4k", 1, "IOPS"), ("randread", "4k", 16, "IOPS"), ("randwrite", "4k", 16, "IOPS"),
                                    ("read", "1m", 8, "MiB/s"), ("write", "1m", 8, "MiB/s")):
        ROWS.append(Row("disk", f"{transport}, {way} {block}, depth {depth}", f"holdfast {transport}, {way} {block}, depth {depth}",
                        unit, "fio with io_uring on the file itself", f"the file, {way} {block}, depth {depth}", ""))


def ours(series, text, transport):
    """A result of `holdfast bench`, which went over that transport."""
    r = json.loads(text)
    if r["transport"] != transport:
        sys.exit(f"{series}: it went over {r['transport']}: {r['fallback']}")
    return r


def extract(kind, series, path, cpu, more=None):
    """Lines of samples.tsv from one result."""
    text = Path(path).read_text()
    out, ops = {}, 0
    if kind == "holdfast":
        r = ours(series, text, more)
        ops, rate, block = r["operations"], r["iops"], r["block_bytes"]
        out["mean", "us"] = r["latency_ns"]["mean"] / 1e3
        out["p99", "us"] = r["latency_ns"]["p99"] / 1e3
        out["client CPU", "us"] = r["client_cpu_ns_per_operation"] / 1e3
        if r["jobs"] > 1:
            out["least of the clients / mean", "x"] = r["jobs_operations"]["min"] / r["jobs_operations"]["mean"]
            out["most of the clients / mean", "x"] = r["jobs_operations"]["max"] / r["jobs_operations"]["mean"]
    elif kind == "fio":
        # Its warnings may come first.
        job = json.loads(text[text.index("{"):])["jobs"][0]
        r = max(job["read"], job["write"], key=lambda way: way["total_ios"])
        if job["error"] or not r["total_ios"]:
            sys.exit(f"{series}: fio failed with error {job['error']}")
        ops, rate, block = r["total_ios"], r["iops"], r["io_bytes"] / r["total_ios"]
        out["mean", "us"] = r["lat_ns"]["mean"] / 1e3
        out["p99", "us"] = r["clat_ns"]["percentile"]["99.000000"] / 1e3
        out["client CPU", "us"] = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] * 1e3 / ops
    else:
        ops, block = int(more), 4096
        rate = ops / float(re.search(r"completed in ([0-9.]+) seconds", text)[1])
    if block >= 1 << 20:
        out["", "MiB/s"] = rate * block / (1 << 20)
    out["", "IOPS"] = rate
    out["CPU", "us"] = float(cpu) / ops
    if block >= 1 << 20:
        out.pop(("CPU", "us"))
    for (what, unit), value in out.items():
        print(f"{series}{', ' + what if what else ''}\t{unit}\t{value:.6g}")


def together(series, paths):
    """Lines of samples.tsv from results of `holdfast bench` that ran at the same time; the p99 is the highest of theirs."""
    results = [ours(series, Path(path).read_text(), "verbs") for path in paths]
    rates = [r["iops"] for r in results]
    mean = sum(rates) / len(rates)
    waited = sum(r["latency_ns"]["mean"] * r["operations"] for r in results) / sum(r["operations"] for r in results)
    p99 = max(r["latency_ns"]["p99"] for r in results)
    for what, unit, value in (("", "IOPS", sum(rates)), (", mean", "us", waited / 1e3), (", p99", "us", p99 / 1e3),
                              (", least of the clients / mean", "x", min(rates) / mean),
                              (", most of the clients / mean", "x", max(rates) / mean)):
        print(f"{series}{what}\t{unit}\t{value:.6g}")


def number(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.3g}"


def spread(values):
    return f"{number(statistics.median(values))} ({number(min(values))}-{number(max(values))})"


def met(ratio, aim):
    if not aim:
        return None
    sign, bound = aim.split()
    return {">=": ratio >= float(bound), "<=": ratio <= float(bound), "<": ratio < float(bound)}[sign]


def read(root):
    """{kind: {(series, unit): [value of each round]}}, and what is to be said about each kind."""
    samples, about = {}, {}
    for kind in ("verbs", "native", "disk"):
        path = root / kind / "samples.tsv"
        if not path.exists() or not (root / kind / "machine.txt").exists():
            continue
        samples[kind] = {}
        for line in path.read_text().splitlines():
            series, unit, value = line.split("\t")
            samples[kind].setdefault((series, unit), []).append(float(value))
        skipped = (root / kind / "skipped.txt").read_text().splitlines()
        about[kind] = (root / kind / "machine.txt").read_text().splitlines(), skipped
    return samples, about


def compare(samples):
    for row in ROWS:
        series = samples.get(row.kind, {})
        ours, theirs = series.get((row.ours, row.unit)), series.get((row.other, row.unit))
        if not ours or not theirs:
            continue
        each = [a / b for a, b in zip(ours, theirs) if b > 0]
        if not each or not statistics.median(theirs):
            continue
        ratio = statistics.median(ours) / statistics.median(theirs)
        if (row.ours + ", ratio", "x") in series:
            # Taken in turns much shorter than a round: the rate of ours to that of theirs.
            each = series[row.ours + ", ratio", "x"]
            ratio = statistics.median(each)
        yield {"kind": row.kind, "path": row.path, "against": row.against, "unit": row.unit, "ours": ours,
               "theirs": theirs, "ratio": ratio, "ratio_least": min(each), "ratio_most": max(each), "aim": row.aim,
               "met": met(ratio, row.aim)}


TITLES = {"verbs": "verbs, in soft-RoCE, one boot", "native": "tcp and local, on loopback",
          "disk": "past the page cache, on a disk"}


def markdown(samples, about, rows, plot):
    out = []
    for kind in samples:
        machine, skipped = about[kind]
        out += [f"#### {TITLES[kind]}", "", "; ".join(machine) + ".", ""]
        out += ["| ours | | against | | ratio (least-most) | aim | |", "|---|---|---|---|---|---|---|"]
        for r in (r for r in rows if r["kind"] == kind):
            less = " (less is better)" if r["unit"] == "us" else ""
            verdict = {None: "", True: "met", False: "**missed**"}[r["met"]]
            out.append(f"| {r['path']} | {spread(r['ours'])} {r['unit']} | {r['against']} | {spread(r['theirs'])} {r['unit']} "
                       f"| **{r['ratio']:.2f}** ({r['ratio_least']:.2f}-{r['ratio_most']:.2f}){less} | {r['aim']} | {verdict} |")
        out.append("")
        s = samples[kind]
        transport, count = CLIENTS.get(kind, ("", 0))
        one = f"holdfast {transport}, {SMALL} 16"
        many = f"{one}, {count} clients"
        if (many, "IOPS") in s:
            out += [f"| 4 KiB reads over {transport}, 16 in flight each | IOPS | mean | p99 | least and most of a client, of the mean |",
                    "|---|---|---|---|---|"]
            for name, series in (("1 client", one), (f"{count} clients", many)):
                fair = "" if series == one else " and ".join(
                    spread(s[f"{series}, {end} of the clients / mean", "x"]) for end in ("least", "most"))
                out.append(f"| {name} | {spread(s[series, 'IOPS'])} | {spread(s[series + ', mean', 'us'])} us "
                           f"| {spread(s[series + ', p99', 'us'])} us | {fair} |")
            out.append("")
        if ("memory for each of 64 clients", "KiB") in s:
            memory = max(s["memory for each of 64 clients", "KiB"])
            out += [f"The data plane's memory grows by at most {number(memory)} KiB for each of the 64 (resident, at its highest).", ""]
        out += [f"Skipped: {line}." for line in skipped] + ([""] if skipped else [])
    if plot:
        out += ["![The ratios of these tables](peers.png)", ""]
    return "\n".join(out)


def draw(rows, path):
    """Ratios as bars, with their spread and the aims. More is better in all of them: ratios of times are turned round."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: python3-matplotlib is not installed", file=sys.stderr)
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def turned(row):
        value, ends = row["ratio"], (row["ratio_least"], row["ratio_most"])
        aim = float(row["aim"].split()[1]) if row["aim"] else None
        if row["unit"] == "us":
            return 1 / value, (1 / ends[1], 1 / ends[0]), aim and 1 / aim
        return value, ends, aim

    rows = list(reversed(rows))
    fig, axes = plt.subplots(figsize=(9, 0.3 * len(rows) + 1.2), dpi=90)
    for y, row in enumerate(rows):
        value, (least, most), aim = turned(row)
        colour = {None: "#9aa7b1", True: "#4c9a6a", False: "#c8674f"}[row["met"]]
        error = [[max(value - least, 0)], [max(most - value, 0)]]
        axes.barh(y, value, color=colour, height=0.66, xerr=error, ecolor="#333333", capsize=2)
        axes.annotate(f"{value:.2f}", (max(value, most), y), textcoords="offset points", xytext=(4, -3), fontsize=7)
        if aim:
            axes.plot([aim, aim], [y - 0.45, y + 0.45], color="black", linewidth=1.6)
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels([f"{r['kind']}: {r['path']} : {r['against']}" for r in rows], fontsize=7)
    axes.axvline(1, color="#666666", linewidth=0.6, linestyle=":")
    axes.set_xscale("log")
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20]
    axes.set_xticks(ticks)
    axes.set_xticklabels([f"{t:g}" for t in ticks])
    axes.minorticks_off()
    low = min(min(turned(r)[1][0], turned(r)[0]) for r in rows)
    high = max(max(turned(r)[1][1], turned(r)[0]) for r in rows)
    axes.set_xlim(min(0.4, low * 0.8), max(2.5, high * 1.4))
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("Holdfast : the other; more is better (times and CPU turned round)\n"
                    "black line: the aim; green: met, red: missed, grey: no aim; whiskers: least and most of the rounds", fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    fig.tight_layout()
    fig.savefig(path)
    return True


def table(root, readme=None):
    root = Path(root)
    samples, about = read(root)
    if not samples:
        sys.exit("no samples")
    rows = list(compare(samples))
    plot = bool(rows) and draw(rows, root / "peers.png")
    text = markdown(samples, about, rows, plot)
    (root / "peers.md").write_text(text)
    series = [{"kind": kind, "series": name, "unit": unit, "median": statistics.median(values), "least": min(values),
               "most": max(values), "rounds": values} for kind in samples for (name, unit), values in samples[kind].items()]
    result = {"machine": {kind: about[kind][0] for kind in about}, "skipped": {kind: about[kind][1] for kind in about},
              "rows": rows, "series": series}
    (root / "peers.json").write_text(json.dumps(result, indent=1) + "\n")
    if readme:
        page = Path(readme)
        before, found, rest = page.read_text().partition(BEGIN)
        _, closed, after = rest.partition(END)
        if not found or not closed:
            sys.exit(f"{readme} has no lines {BEGIN} and {END}")
        page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
        if plot:
            shutil.copyfile(root / "peers.png", page.with_name("peers.png"))


def main():
    match sys.argv[1:]:
        case ["extract", kind, series, path, cpu, *more] if len(more) <= 1:
            extract(kind, series, path, cpu, *more)
        case ["together", series, path, *more]:
            together(series, [path, *more])
        case ["table", root]:
            table(root)
        case ["table", root, "--readme", readme]:
            table(root, readme)
        case _:
            sys.exit(__doc__)


main()
