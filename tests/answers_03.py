"""What students write for lesson 03's build task: right answers, and wrong ones with the phrase
that each must be told."""

RIGHT = '''
def my_gqa(q, k, v):
    (N, H), K = q.shape, len(k)
    rows = q.view(K, N // K, H)
    scores = rows @ k.transpose(1, 2) / H**0.5
    return (scores.softmax(-1) @ v).reshape(N, H)
'''

LOOP = '''
def my_gqa(q, k, v):
    (N, H), K = q.shape, k.shape[0]
    G, out = N // K, []
    for i in range(K):
        scores = q[i * G:(i + 1) * G] @ k[i].T / H**0.5
        out.append(torch.softmax(scores, dim=1) @ v[i])
    return torch.cat(out)
'''

EINSUM = '''
def my_gqa(q, k, v):
    (N, H), K = q.shape, k.shape[0]
    scores = torch.einsum("kgh,ksh->kgs", q.reshape(K, -1, H), k) / math.sqrt(H)
    return torch.einsum("kgs,ksh->kgh", scores.softmax(-1), v).reshape(N, H)
'''

SDPA = '''
def my_gqa(q, k, v):
    (N, H), K = q.shape, k.shape[0]
    rows = q.view(1, K, N // K, H)
    out = torch.nn.functional.scaled_dot_product_attention(rows, k[None], v[None])
    return out.view(N, H)
'''

BY_HEAD = '''
def my_gqa(q, k, v):
    (N, H), K = q.shape, k.shape[0]
    out = []
    for n in range(N):
        scores = k[n // (N // K)] @ q[n] / H**0.5
        out.append(scores.softmax(0) @ v[n // (N // K)])
    return torch.stack(out)
'''

GIVEN = "import math"
ROWS, MANY = "q.view(K, N // K, H)", "k, v = (x.repeat_interleave(N // K, dim=0) for x in (k, v))"
COPIES = RIGHT.replace(f"rows = {ROWS}", f"{MANY}\n    rows = q.view(N, 1, H)")
for part in (ROWS, " / H**0.5", "softmax(-1)", "@ v", ".reshape(N, H)"):
    assert part in RIGHT

ANSWERS = {
    "right": RIGHT,
    "right, KV head by KV head": LOOP,
    "right, with einsum": EINSUM,
    "right, with scaled_dot_product_attention": SDPA,
    "right, softmax by hand": RIGHT.replace(
        "scores.softmax(-1)", "(scores - scores.amax(-1, True)).exp() "
        "/ (scores - scores.amax(-1, True)).exp().sum(-1, True)"),
    "copies first": COPIES,
    "copies first, by expand": RIGHT.replace(
        f"rows = {ROWS}", "k, v = (x[:, None].expand(K, N // K, -1, H).reshape(N, -1, H) "
        "for x in (k, v))\n    rows = q.view(N, 1, H)"),
    "query head by query head": BY_HEAD,
    "broadcasts": RIGHT.replace(ROWS, "q.view(K, N // K, 1, H)").replace(
        "k.transpose(1, 2)", "k.transpose(1, 2)[:, None]").replace("@ v", "@ v[:, None]"),
    "heads dealt out in turn": RIGHT.replace(ROWS, "q.view(N // K, K, H).transpose(0, 1)").replace(
        "v).reshape", "v).transpose(0, 1).reshape"),
    "copies in turn": COPIES.replace("repeat_interleave(N // K, dim=0)", "repeat(N // K, 1, 1)"),
    "not scaled": RIGHT.replace(" / H**0.5", ""),
    "scaled by H": RIGHT.replace("H**0.5", "H"),
    "softmax over the heads": RIGHT.replace("softmax(-1)", "softmax(1)"),
    "sums keys": RIGHT.replace("@ v", "@ k"),
    "one query for a group": RIGHT.replace(ROWS, f"{ROWS}.mean(1, keepdim=True)").replace(
        ".reshape(N, H)", ".expand(K, N // K, H).reshape(N, H)"),
    "shape of the groups": RIGHT.replace(".reshape(N, H)", ""),
    "one row": RIGHT.replace(".reshape(N, H)", ".reshape(1, N * H)"),
    "exp alone": RIGHT.replace("scores.softmax(-1)", "scores.exp() / scores.exp().sum(-1, True)"),
    "scales the caller's queries": RIGHT.replace("    rows", "    q *= H**-0.5\n    rows").replace(
        " / H**0.5", ""),
    "in double": RIGHT.replace(ROWS, f"{ROWS}.double()").replace(
        "k.transpose", "k.double().transpose").replace("@ v", "@ v.double()"),
    "returns nothing": RIGHT.replace("return ", "out = "),
    "raises": RIGHT.replace("len(k)", "k.heads"),
}

MESSAGES = {
    "copies first": "the operations read 24 heads of keys or values",
    "copies first, by expand": "where 4 are kept",
    "query head by query head": "read 12 heads of keys or values (mv",
    "broadcasts": "each KV head is read once for its group",
    "heads dealt out in turn": "neighbouring query heads share a KV head. With N = 4, K = 2, S = "
                               "3, H = 4, query head 1 begins with",
    "copies in turn": "That is what KV head 1 gives; this query head reads KV head 0",
    "not scaled": "Those are the scores not divided by sqrt(H)",
    "scaled by H": "Those are the scores divided by H, not by sqrt(H)",
    "softmax over the heads": "one head is a weighted sum of its values",
    "sums keys": "That is the weighted sum of keys, not of values",
    "one query for a group": "with one KV head it is multi query attention",
    "shape of the groups": "it returned the shape [1, 1, 4]; [N, H] = [1, 4] is asked for",
    "one row": "it returned the shape [1, 12]; [N, H] = [3, 4] is asked for",
    "exp alone": "large scores do not overflow",
    "scales the caller's queries": "It writes into q",
    "in double": "it returned torch.float64; torch.float32, as q, is asked for",
    "returns nothing": "it returned None; a tensor [N, H] is asked for",
    "raises": "raised AttributeError",
}
