"""What students write for lesson 02's build task: right answers, and wrong ones with the phrase
that each must be told."""

RIGHT = '''
class MyCache:
    def __init__(self, layers, kv_heads, head_dim, capacity):
        self.capacity = capacity
        self.keys = torch.zeros(layers, kv_heads, capacity, head_dim)
        self.values = torch.zeros(layers, kv_heads, capacity, head_dim)
        self.lengths = [0] * layers

    def append(self, layer, k, v):
        start = self.lengths[layer]
        end = start + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"{end} tokens, but the capacity is {self.capacity}")
        self.keys[layer, :, start:end] = k
        self.values[layer, :, start:end] = v
        self.lengths[layer] = end

    def read(self, layer):
        end = self.lengths[layer]
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def truncate(self, length):
        self.lengths = [min(length, each) for each in self.lengths]
'''

CAT = '''
class MyCache:
    def __init__(self, layers, kv_heads, head_dim, capacity):
        self.capacity = capacity
        self.keys = [torch.empty(kv_heads, 0, head_dim) for _ in range(layers)]
        self.values = [torch.empty(kv_heads, 0, head_dim) for _ in range(layers)]

    def append(self, layer, k, v):
        if self.keys[layer].shape[1] + k.shape[1] > self.capacity:
            raise ValueError("full")
        self.keys[layer] = torch.cat([self.keys[layer], k], dim=1)
        self.values[layer] = torch.cat([self.values[layer], v], dim=1)

    def read(self, layer):
        return self.keys[layer], self.values[layer]

    def truncate(self, length):
        self.keys = [each[:, :length] for each in self.keys]
        self.values = [each[:, :length] for each in self.values]
'''

LISTS = '''
class MyCache:
    def __init__(self, layers, kv_heads, head_dim, capacity):
        self.shape, self.capacity = (kv_heads, 0, head_dim), capacity
        self.tokens = {layer: [] for layer in range(layers)}

    def append(self, layer, k, v):
        kept = self.tokens[layer]
        if len(kept) + k.shape[1] > self.capacity:
            raise ValueError
        for t in range(k.shape[1]):
            kept.append((k[:, t].clone(), v[:, t].clone()))

    def read(self, layer):
        kept = self.tokens[layer]
        if not kept:
            return torch.zeros(self.shape), torch.zeros(self.shape)
        return (torch.stack([k for k, _ in kept], dim=1),
                torch.stack([v for _, v in kept], dim=1))

    def truncate(self, length):
        for kept in self.tokens.values():
            del kept[length:]
'''

NONE = '''
class MyCache:
    def __init__(self, layers, kv_heads, head_dim, capacity):
        self.capacity, self.kept = capacity, [None] * layers

    def append(self, layer, k, v):
        new = torch.stack((k, v))
        if self.kept[layer] is not None:
            new = torch.cat([self.kept[layer], new], dim=2)
        if new.shape[2] > self.capacity:
            raise ValueError("full")
        self.kept[layer] = new

    def read(self, layer):
        return self.kept[layer][0], self.kept[layer][1]

    def truncate(self, length):
        self.kept = [each[:, :, :length] for each in self.kept]
'''

CHECK = """        if end > self.capacity:
            raise ValueError(f"{end} tokens, but the capacity is {self.capacity}")
"""
CUT = "self.lengths = [min(length, each) for each in self.lengths]"
FULL = """        if self.keys[layer].shape[1] + k.shape[1] > self.capacity:
            raise ValueError("full")
"""
LATE = "        self.values[layer] = torch.cat([self.values[layer], v], dim=1)\n"
PAIR = "self.keys[layer, :, :end], self.values[layer, :, :end]"
EMPTY = "{layer: [] for layer in range(layers)}"
for part, whole in ((CHECK, RIGHT), (CUT, RIGHT), (PAIR, RIGHT), (FULL, CAT), (LATE, CAT),
                    (EMPTY, LISTS)):
    assert part in whole

ANSWERS = {
    "right": RIGHT,
    "right, with torch.cat": CAT,
    "right, with lists": LISTS,
    "right, from None on": NONE,
    "right, from an empty dict on": NONE.replace("[None] * layers", "{}")
    .replace("self.kept[layer] is not None", "layer in self.kept")
    .replace("[each[:, :, :length] for each in self.kept]",
             "{key: each[:, :, :length] for key, each in self.kept.items()}"),
    "truncate beyond the length": RIGHT.replace(CUT, "self.lengths = [length] * len(self.lengths)"),
    "stores bf16": RIGHT.replace("head_dim)\n        self", "head_dim, dtype=torch.bfloat16)\n"
                                 "        self"),
    "stores bf16, reads fp32": CAT.replace(", k]", ", k.bfloat16().float()]"),
    "keeps only the last chunk": CAT.replace("torch.cat([self.keys[layer], k], dim=1)", "k.clone()")
    .replace("torch.cat([self.values[layer], v], dim=1)", "v.clone()"),
    "grows along the heads": CAT.replace("dim=1", "dim=0"),
    "reads room that is still empty": RIGHT.replace(PAIR, "self.keys[layer], self.values[layer]"),
    "gives keys for values": RIGHT.replace(
        PAIR, "self.keys[layer, :, :end], self.keys[layer, :, :end]"),
    "one storage for all layers": RIGHT.replace("zeros(layers,", "zeros(1,")
    .replace("[layer, :", "[0, :"),
    "one length for all layers": RIGHT.replace("self.lengths[layer]", "self.lengths[0]"),
    "one list, many times": LISTS.replace(EMPTY, "dict.fromkeys(range(layers), [])"),
    "writes one token of a chunk": RIGHT.replace("k.shape[1]", "1").replace("= k\n", "= k[:, :1]\n")
    .replace("= v\n", "= v[:, :1]\n"),
    "writes the last token of a chunk everywhere": RIGHT.replace("= k\n", "= k[:, -1:]\n")
    .replace("= v\n", "= v[:, -1:]\n"),
    "truncate does not forget": RIGHT.replace(CUT, "pass"),
    "truncate forgets in layer 0 only": RIGHT.replace(CUT, "self.lengths[0] = length"),
    "truncate cuts off the front": CAT.replace("each[:, :length]", "each[:, -length:]"),
    "the next append leaves a gap": RIGHT.replace(
        "self.lengths = [0] * layers", "self.lengths, self.next = [0] * layers, [0] * layers")
    .replace("start = self.lengths[layer]", "start = self.next[layer]")
    .replace("self.lengths[layer] = end", "self.lengths[layer] = self.next[layer] = end"),
    "a full cache overwrites": RIGHT.replace(CHECK, """        if end > self.capacity:
            start, end = self.capacity - k.shape[1], self.capacity
"""),
    "a full cache does not look": RIGHT.replace(CHECK, ""),
    "a full cache raises something else": RIGHT.replace("ValueError", "IndexError"),
    "refuses too late": CAT.replace(FULL, "").replace(LATE, LATE + FULL.replace(
        "self.keys[layer].shape[1] + k.shape[1]", "self.keys[layer].shape[1]")),
    "refuses the last that fits": RIGHT.replace("end > self.capacity", "end >= self.capacity"),
    "keeps the caller's tensors": LISTS.replace(".clone()", ""),
    "lists of the class": LISTS.replace("    def __init__", "    tokens = {}\n\n    def __init__")
    .replace(f"self.tokens = {EMPTY}",
             "[self.tokens.setdefault(layer, []) for layer in range(layers)]"),
    "raises": RIGHT.replace("k.shape[1]", "k.length"),
    "returns nothing": RIGHT.replace(f"return {PAIR}", "pass"),
}

MESSAGES = {
    "truncate beyond the length": "truncate(5), read(0) gave keys of 5 tokens; expected 3",
    "stores bf16": "gave keys of dtype torch.bfloat16; expected torch.float32",
    "stores bf16, reads fp32": "Is a dtype with fewer bits in between?",
    "keeps only the last chunk": "After appending 1 token, then appending 1 token, read(0) gave "
                                 "keys of 1 token; expected 2",
    "grows along the heads": "raised RuntimeError: Sizes of tensors must match",
    "reads room that is still empty": "After appending 1 token, read(0) gave keys of 16 tokens; "
                                     "expected 1",
    "gives keys for values": "keys are read as keys and values as values. After appending 1 token, "
                             "the values of token 1 in read(0) begin with 1; -1 was appended",
    "one storage for all layers": "each layer keeps its own",
    "one length for all layers": "each layer keeps its own",
    "one list, many times": "each layer keeps its own",
    "writes one token of a chunk": "After appending 2 tokens, read(0) gave keys of 1 token; expec",
    "writes the last token of a chunk everywhere": "the keys of token 1 in read(0) begin with 2; 1",
    "truncate does not forget": "truncate forgets in every layer",
    "truncate forgets in layer 0 only": "truncate(1), read(1) gave keys of 3 tokens; expected 1",
    "truncate cuts off the front": "truncate(1), the keys of token 1 in read(0) begin with 3; 1",
    "the next append leaves a gap": "truncate forgets in every layer",
    "a full cache overwrites": "Of capacity 3, with 3 tokens kept, append took 1 more",
    "a full cache does not look": "Of capacity 3, with 3 tokens kept, append took 1 more",
    "a full cache raises something else": "raised IndexError",
    "refuses too late": "a refused append of 1 token, read(0) gave keys of 4 tokens; expected 3",
    "refuses the last that fits": "Of capacity 3, with 0 tokens kept, append refused 3 more",
    "keeps the caller's tensors": "tensors of the caller may be written over",
    "lists of the class": "append then read returns what was appended",
    "raises": "raised AttributeError",
    "returns nothing": "read(0) gave None; expected two tensors",
}
