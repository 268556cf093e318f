"""What students write for lesson 01's build task: one right answer, and wrong ones."""

RIGHT = '''
def my_decode_step(config, batch, context):
    D, L = config["hidden_size"], config["num_hidden_layers"]
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    F, V = config["intermediate_size"], config["vocab_size"]
    H = config.get("head_dim", D // N)
    layer = D * (N + 2 * K) * H + N * H * D + 3 * D * F
    weights = L * layer + V * D
    cached = 2 * L * K * H * batch * context
    attention = 4 * L * N * H * context
    flops = batch * (2 * weights + attention)
    moved = 2 * (weights + cached)
    return flops, moved
'''

ALSO_RIGHT = {
    "activations counted": RIGHT.replace(
        "    return flops, moved",
        "    rows = L * (12 * D + 2 * (N + 2 * K) * H + 8 * F)\n"
        "    return flops, moved + 2 * batch * rows"),
    "new keys and values written": RIGHT.replace("* batch * context", "* batch * (context + 1)"),
    "a list": RIGHT.replace("return flops, moved", "return [flops, moved]"),
}

ANSWERS = {
    "right": RIGHT,
    "query heads in the cache": RIGHT.replace("2 * L * K * H", "2 * L * N * H"),
    "width in the cache": RIGHT.replace("2 * L * K * H", "2 * L * D"),
    "keys without values": RIGHT.replace("2 * L * K * H", "L * K * H"),
    "one layer's cache": RIGHT.replace("2 * L * K * H", "2 * K * H"),
    "one FLOP": RIGHT.replace("2 * weights + attention", "weights + attention / 2"),
    "embedding streamed": RIGHT.replace(
        "2 * (weights + cached",
        "2 * (V * D * (not config['tie_word_embeddings']) + weights + cached"),
    "embedding streamed, tied too": RIGHT.replace("moved = 2 * (w", "moved = 2 * (V * D + w"),
    "head forgotten": RIGHT.replace("L * layer + V * D", "L * layer"),
    "head forgotten in the bytes": RIGHT.replace("2 * (weights +", "2 * (L * layer +"),
    "head forgotten where tied": RIGHT.replace(
        "moved = 2 * (w", "moved = 2 * (-V * D * config['tie_word_embeddings'] + w"),
    "weights times batch": RIGHT.replace("2 * (weights +", "2 * (batch * weights +"),
    "one cache for all": RIGHT.replace("K * H * batch * context", "K * H * context"),
    "no cache": RIGHT.replace("2 * (weights + cached)", "2 * weights"),
    "head_dim derived": RIGHT.replace('config.get("head_dim", D // N)', "D // N"),
    "head_dim demanded": RIGHT.replace('config.get("head_dim", D // N)', 'config["head_dim"]'),
    "fp32": RIGHT.replace("moved = 2 *", "moved = 4 *"),
    "KV heads compute": RIGHT.replace("4 * L * N * H", "4 * L * K * H"),
    "scores alone": RIGHT.replace("4 * L * N * H", "2 * L * N * H"),
    "no attention": RIGHT.replace("4 * L * N * H", "0"),
    "one sequence computes": RIGHT.replace("flops = batch *", "flops ="),
    "two matrices in the MLP": RIGHT.replace("3 * D * F", "2 * D * F"),
    "values for every query head": RIGHT.replace("(N + 2 * K) * H", "3 * N * H"),
    "no output matrix": RIGHT.replace(" + N * H * D", ""),
    "output matrix D x D": RIGHT.replace("N * H * D", "D * D"),
    "bytes alone": RIGHT.replace("return flops, moved", "return moved"),
    "the wrong way round": RIGHT.replace("return flops, moved", "return moved, flops"),
}

MESSAGES = {
    "query heads in the cache": "That is N = 32 heads (or D numbers); the cache holds K = 8",
    "width in the cache": "(or D numbers)",
    "values for every query head": "they have the KV heads alone",
    "keys without values": "Keys and values are two",
    "one layer's cache": "That is one layer; there are 32",
    "one FLOP": "one FLOP for a multiply and an add",
    "embedding streamed": "a step looks up one row of it",
    "embedding streamed, tied too": "a step looks up one row of it",
    "head forgotten": "The LM head is missing",
    "head forgotten in the bytes": "The LM head is missing: every step reads",
    "head forgotten where tied": "tied: the embedding table is the LM head",
    "weights times batch": "All sequences share one reading of the weights",
    "one cache for all": "each sequence reads its own cache",
    "no cache": "A step reads the keys and values of all of them",
    "head_dim derived": "That is D/N = 80 numbers a head; this config states head_dim = 128",
    "head_dim demanded": "raised KeyError",
    "fp32": "A number in bf16 has 2 bytes",
    "KV heads compute": "all N = 32 query heads compute",
    "scores alone": "Scores and weighted sum",
    "no attention": "your FLOPs do not grow with the context",
    "one sequence computes": "Every row meets every weight",
    "two matrices in the MLP": "gate, up and down",
    "no output matrix": "The output matrix of attention is missing",
    "output matrix D x D": "N·H is not D",
    "bytes alone": "a pair is asked for",
    "the wrong way round": "(flops, bytes) are swapped",
}
