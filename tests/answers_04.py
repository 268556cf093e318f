"""What students write for lesson 04's build task: right answers, and wrong ones with the phrase
that each must be told."""

RIGHT = '''
def my_step(model, new, caches):
    counts = [len(tokens) for tokens in new]
    x = model.embed([token for tokens in new for token in tokens])
    positions = [cache.length + t for cache, T in zip(caches, counts) for t in range(T)]
    for layer in range(model.L):
        q, k, v = model.qkv(layer, x, positions)
        parts, start = [], 0
        for cache, T in zip(caches, counts):
            rows = slice(start, start + T)
            parts.append(cache.attend(layer, q[rows], k[rows], v[rows]))
            start += T
        x = model.mlp(layer, x, torch.cat(parts))
    last, end = [], 0
    for T in counts:
        end += T
        last.append(end - 1)
    return model.head(x[last])
'''

SPLIT = '''
def my_step(model, new, caches):
    counts = [len(tokens) for tokens in new]
    x = model.embed(sum(new, []))
    places = [torch.arange(c.length, c.length + T) for c, T in zip(caches, counts)]
    for layer in range(model.L):
        split = zip(caches, *(each.split(counts)
                              for each in model.qkv(layer, x, torch.cat(places))))
        x = model.mlp(layer, x, torch.cat([c.attend(layer, *part) for c, *part in split]))
    return model.head(x[torch.tensor(counts).cumsum(0) - 1])
'''

ONE_BY_ONE = '''
def my_step(model, new, caches):
    logits = []
    for tokens, cache in zip(new, caches):
        x = model.embed(tokens)
        positions = [cache.length + t for t in range(len(tokens))]
        for layer in range(model.L):
            q, k, v = model.qkv(layer, x, positions)
            x = model.mlp(layer, x, cache.attend(layer, q, k, v))
        logits.append(model.head(x[-1:]))
    return torch.cat(logits)
'''

PADDED = '''
def my_step(model, new, caches):
    most = max(map(len, new))
    x = model.embed([token for tokens in new for token in tokens + [0] * (most - len(tokens))])
    positions = [cache.length + t for cache in caches for t in range(most)]
    for layer in range(model.L):
        q, k, v = model.qkv(layer, x, positions)
        out = torch.zeros(len(x), 16)
        for i, (cache, tokens) in enumerate(zip(caches, new)):
            rows = slice(i * most, i * most + len(tokens))
            out[rows] = cache.attend(layer, q[rows], k[rows], v[rows])
        x = model.mlp(layer, x, out)
    return model.head(x[[i * most + len(tokens) - 1 for i, tokens in enumerate(new)]])
'''

PLACES = "[cache.length + t for cache, T in zip(caches, counts) for t in range(T)]"
ATTEND = "cache.attend(layer, q[rows], k[rows], v[rows])"
LAST = """    last, end = [], 0
    for T in counts:
        end += T
        last.append(end - 1)
"""
HEAD = "model.head(x[last])"
assert all(part in RIGHT for part in (PLACES, ATTEND, LAST, HEAD))

ANSWERS = {
    "right": RIGHT,
    "right, with split and cumsum": SPLIT,
    "one sequence after another": ONE_BY_ONE,
    "pads to the longest": PADDED,
    "one long text": RIGHT.replace(PLACES, "list(range(sum(counts)))"),
    "positions forget the past": RIGHT.replace("cache.length + t", "t"),
    "one position for a whole chunk": RIGHT.replace("cache.length + t", "cache.length"),
    "all rows to the first cache": RIGHT.replace(
        ATTEND, "caches[0].attend(layer, q[rows], k[rows], v[rows])"),
    "all rows to each cache": RIGHT.replace(ATTEND, "cache.attend(layer, q, k, v)[rows]"),
    "equal shares": RIGHT.replace("for cache, T in zip(caches, counts):\n            rows",
                                  "for cache in caches:\n            T = sum(counts) // len(counts)"
                                  "\n            rows"),
    "start stands still": RIGHT.replace("            start += T\n", ""),
    "only the newest token to the cache": RIGHT.replace("slice(start, start + T)",
                                                        "slice(start + T - 1, start + T)"),
    "the last row of the batch": RIGHT.replace(HEAD, "model.head(x[-1:])"),
    "the first row of each sequence": RIGHT.replace("last.append(end - 1)", "last.append(end - T)"),
    "rows 0 to B - 1": RIGHT.replace(HEAD, "model.head(x[:len(new)])"),
    "the LM head over all rows": RIGHT.replace(HEAD, "model.head(x)[last]"),
    "stacks the parts": RIGHT.replace("torch.cat(parts)", "torch.stack(parts)"),
    "in reverse order": RIGHT.replace("torch.cat(parts)", "torch.cat(parts[::-1])"),
    "raises": RIGHT.replace("cache.length", "cache.size"),
    "returns nothing": RIGHT.replace("    return", "   "),
}

MESSAGES = {
    "one sequence after another": "qkv of layer 1 ran 2 times. Each run reads its weights",
    "pads to the longest": "qkv got 6 rows; the new tokens are 3 + 1 = 4",
    "one long text": "the positions were [0]; expected [2]",
    "positions forget the past": "the positions were [0]; expected [2]",
    "one position for a whole chunk": "the positions were [0, 0, 0]; expected [0, 1, 2]",
    "all rows to the first cache": "cache 0 got the rows [0, 1] of the step; expected [0]",
    "all rows to each cache": "of a sequence that brings 1 row got 2 rows of q, 2 of k",
    "equal shares": "of a sequence that brings 3 rows got 2 rows of q",
    "start stands still": "cache 1 got the rows [0] of the step; expected [1]",
    "only the newest token to the cache": "of a sequence that brings 3 rows got 1 row of q",
    "the last row of the batch": "it gave [1, 17]; expected logits [B, V] = [2, 17]",
    "the first row of each sequence": "They are those behind its first new token",
    "rows 0 to B - 1": "They are those behind its first new token",
    "the LM head over all rows": "the LM head got 4 rows; the last of each sequence, 2 in all",
    "stacks the parts": "raised RuntimeError: stack expects each tensor to be equal size",
    "in reverse order": "the logits of sequence 0 differ by",
    "raises": "raised AttributeError",
    "returns nothing": "it gave None; expected logits [B, V]",
}
