"""The diagrams of lesson 03: query heads and what they read under MHA, GQA, MQA and MLA; grouped
queries as rows of one product; and the tokens that layers remember through windows."""

from collections.abc import Iterator

from clawdemy_course.drawing import ACTIVATIONS, COMPUTE, KV, LAUNCH, Diagram
from clawdemy_infer.arithmetic.work import at_least_1

PANEL = 196
"""Units from one of four panels to the next."""


def _panels(d: Diagram, said: dict[str, str], pitch: float = PANEL, top: float = 18,
            size: float = 16) -> Iterator[tuple[float, str]]:
    """The left end and the name of each panel of `said`, one step of the picture after the other,
    with its name and what is said of it on top."""
    for place, (name, what) in enumerate(said.items()):
        if place:
            d.step()
        left = 14 + pitch * place
        d.text(left, top, name, size, bold=True)
        d.text(left, top + 24, what, 13)
        yield left, name


def _equal_groups(query_heads: int, kv_heads: int, most: int) -> None:
    if not 1 < kv_heads < query_heads <= most or query_heads % kv_heads:
        raise ValueError(f"query_heads={query_heads}, kv_heads={kv_heads}: up to {most} query "
                         "heads in equal groups, more than one of them, are drawn")


def heads(query_heads: int = 8, kv_heads: int = 2, head_dim: int = 128, latent: int = 512,
          rope: int = 64) -> Diagram:
    """What one token leaves in a layer for `query_heads` query heads: a key and a value for each
    (MHA), for each group (GQA), for all (MQA), or one latent from which all are made (MLA).
    ValueError unless 1 < `kv_heads` < `query_heads` <= 8, and the second is divided by the first.
    """
    at_least_1(head_dim=head_dim, latent=latent, rope=rope)
    _equal_groups(query_heads, kv_heads, most=8)
    kinds = {"MHA": query_heads, "GQA": kv_heads, "MQA": 1}
    kept = {name: 2 * count * head_dim for name, count in kinds.items()} | {"MLA": latent + rope}
    d = Diagram(800, 356, f"What {query_heads} query heads read in a layer. MHA keeps a key and a "
                f"value for each of them, GQA for each group of {query_heads // kv_heads}, MQA one "
                "for all, MLA a latent from which each head's key and value are made. Numbers kept "
                "for a token: " + ", ".join(f"{name} {count:,}" for name, count in kept.items())
                + ".")
    said = {"MHA": "a KV head for\neach query head",
            "GQA": f"a KV head for each\ngroup of {query_heads // kv_heads}",
            "MQA": "one KV head\nfor all", "MLA": "one latent\nfor all"}
    for left, name in _panels(d, said):
        if name == "MLA":
            _latent(d, left, query_heads)
        else:
            _kv_heads(d, left, query_heads, kinds[name])
        d.text(left, 292, f"{kept[name]:,} numbers", 14, bold=True)
        d.bar(left, 304, 168 * kept[name] / max(kept.values()), 12, KV)
    d.step()
    d.text(14, 338, f"kept for a token in a layer; each head has {head_dim} numbers, keys and "
           f"values alike; the latent {latent} + {rope} for positions", 13)
    return d


def _kv_heads(d: Diagram, left: float, queries: int, count: int) -> None:
    """Query heads below, KV heads above, a line from each query head to the one that it reads."""
    each = 168 / queries
    for head in range(count):
        middle = left + 168 * (head + 0.5) / count
        width = min(each - 3, 18)
        for query in range(queries // count):
            at = left + each * (head * queries // count + query + 0.5)
            d.line((at, 222), (middle, 150), colour=KV)
        d.box(middle - width / 2, 78, width, 34, "k" if width > 12 else "", KV, size=13)
        d.box(middle - width / 2, 116, width, 34, "v" if width > 12 else "", KV, size=13)
    _queries(d, left, queries)


def _queries(d: Diagram, left: float, queries: int) -> None:
    each = 168 / queries
    for query in range(queries):
        d.box(left + each * query + 1.5, 222, each - 3, 40, "q", ACTIVATIONS, size=13)


def _latent(d: Diagram, left: float, queries: int) -> None:
    """One latent above; a key and a value of each head, made from it, between."""
    each = 168 / queries
    d.box(left + 40, 78, 88, 30, "latent", KV, size=13)
    for query in range(queries):
        at = left + each * (query + 0.5)
        d.line((left + 84, 108), (at, 150), colour=KV)
        for y in (150, 172):
            d.box(at - each / 2 + 3, y, each - 6, 18, edge=KV, dashed=True)
        d.line((at, 190), (at, 222), colour=KV)
    _queries(d, left, queries)


def grouped(query_heads: int = 9, kv_heads: int = 3) -> Diagram:
    """How often keys are read for one new token: query head by query head, after copies were made,
    and with the query heads of a group as rows of one product. ValueError as `heads`, up to 9."""
    _equal_groups(query_heads, kv_heads, most=9)
    G = query_heads // kv_heads
    d = Diagram(800, 330, f"Three ways to let {query_heads} query heads read {kv_heads} KV heads. "
                f"Head by head, each KV head is read {G} times. Copied first, it is read once, "
                f"written {G} times and read {G} times. Grouped, the {G} query heads of a group "
                "are rows of one product, and each KV head is read once.")
    each = 184 / query_heads
    said = {"head by head": f"each KV head is read {G} times",
            "copied first": f"read once, written {G} times,\nread {G} times",
            "grouped": f"{G} rows of one product,\nread once"}
    totals = {"head by head": f"{query_heads} heads read",
              "copied first": f"{kv_heads} + {query_heads} heads read, {query_heads} written",
              "grouped": f"{kv_heads} heads read"}
    for left, name in _panels(d, said, pitch=264, top=20):
        for head in range(kv_heads):
            top = 84 + head * (G * each + 10)
            middle = top + G * each / 2 - 1.5
            for row in range(G):
                _query(d, left, top + row * each, middle, each - 3, name)
            if name == "grouped":
                d.box(left - 5, top - 4, 40, G * each + 5, edge=COMPUTE)
                d.arrow((left + 136, middle), (left + 38, middle), colour=KV, width=3)
            d.box(left + 136, middle - 16, 90, 32, f"KV head {head}", KV, size=13)
        d.text(left, 312, totals[name], 14, bold=True)
    return d


def _query(d: Diagram, left: float, top: float, middle: float, tall: float, way: str) -> None:
    """A query head, and how its KV head, at the height `middle`, comes to it."""
    y = top + tall / 2
    d.box(left, top, 30, tall, "q", ACTIVATIONS, size=13)
    if way == "head by head":
        d.line((left + 136, middle), (left + 32, y), colour=KV, width=2.5)
    elif way == "copied first":
        d.line((left + 136, middle), (left + 112, y), colour=KV, width=2.5)
        d.box(left + 56, top, 56, tall, "copy", LAUNCH, size=13)
        d.line((left + 56, y), (left + 32, y), colour=KV, width=2.5)


def windows(layers: int = 6, tokens: int = 12, window: int = 4, sinks: int = 1) -> Diagram:
    """Which tokens each layer remembers: all, those in a window, these and the first as sinks, or
    all in one layer alone and a window in the others. ValueError for more than 6 layers or 14
    tokens, and where window and sinks are not fewer than the tokens."""
    at_least_1(layers=layers, tokens=tokens, window=window, sinks=sinks)
    if layers > 6 or tokens > 14 or window + sinks >= tokens:
        raise ValueError(f"layers={layers}, tokens={tokens}, window={window}, sinks={sinks}: up to "
                         "6 layers and 14 tokens, more than window and sinks, are drawn")
    newest = set(range(tokens - window, tokens))
    first, every = set(range(sinks)), set(range(tokens))
    kinds = {"full attention": [every] * layers, "sliding window": [newest] * layers,
             "window and sinks": [first | newest] * layers,
             "local and global": [newest] * (layers - 1) + [every]}
    counts = {name: sum(map(len, kept)) for name, kept in kinds.items()}
    begin = "the first token" if sinks == 1 else f"the first {sinks} tokens"
    d = Diagram(800, 300, f"Which of {tokens} tokens each of {layers} layers keeps. Full attention "
                f"keeps all, a sliding window the last {window}, an attention sink also {begin}; "
                f"with local and global layers {layers - 1} have a window, and one keeps all. Keys "
                "kept: " + ", ".join(f"{name} {count}" for name, count in counts.items()) + ".")
    said = {"full attention": "each layer keeps\nall tokens",
            "sliding window": f"the last {window} tokens;\nthe rest is gone",
            "window and sinks": f"and {begin},\nan attention sink",
            "local and global": "one layer keeps all,\nthe others a window"}
    each = 168 / tokens
    for left, name in _panels(d, said, size=15):
        for layer, seen in enumerate(reversed(kinds[name])):       # the last layer on top
            d.box(left, 77 + 26 * layer, 168, 24, edge=KV)
            for token in sorted(seen):
                d.box(left + each * token + 1, 78 + 26 * layer, each - 2, 22, fill=KV)
        d.text(left, 78 + 26 * layers + 18, f"{counts[name]} of {counts['full attention']} keys",
               14, bold=True)
    d.step()
    d.text(14, 78 + 26 * layers + 50, f"rows: {layers} layers, columns: {tokens} tokens, the "
           "newest right; filled: its key and value are kept", 13)
    return d
