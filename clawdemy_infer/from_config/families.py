"""The numbers of a ModelShape from the keys of a config.json, as `data/families.toml` says for each
family. What a table cannot say is in `special`."""

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from clawdemy_infer.arithmetic import MLA, MoE
from clawdemy_infer.from_config import special
from clawdemy_infer.from_config.keys import Keys

MAX_LAYERS = 1000
USUAL = {"L": "num_hidden_layers", "D": "hidden_size", "N": "num_attention_heads",
         "K": "num_key_value_heads", "H": "head_dim", "F": "intermediate_size", "V": "vocab_size"}
"""The keys that most families give the letters."""

WORDS = {"full_attention": "global", "sliding_attention": "local"}
"""What every family may say in layer_types."""


@cache
def tables() -> dict[str, dict]:
    return tomllib.loads(files("clawdemy_data").joinpath("families.toml").read_text("utf-8"))


@cache
def family(name: str) -> dict:
    """All that holds for the family `name`, what it is like included."""
    own = tables()[name]
    found = dict(family(own["like"])) if "like" in own else {}
    if hasattr(special, name) or "by" not in found:
        found["by"] = name
    for entry, value in own.items():
        if entry == "harmless":
            value = [*found.get("harmless", ()), *value]
        found[entry] = found.get(entry, {}) | value if isinstance(value, dict) else value
    return found


def names() -> list[str]:
    return sorted(name for name in tables() if not name.startswith("_"))


def read(name: str, keys: Keys) -> dict:
    """The fields of the ModelShape of a config of the family `name`. What is left in `keys` nobody
    asked for."""
    # 1. The keys under their usual names, and what their absence means.
    says = family(name)
    for key, usual in says.get("says", {}).items():
        keys.rename(key, usual)
    for key, value in says.get("absent", {}).items():
        if keys.left.get(key) is None and value is not False:
            keys.left[key] = _absent(keys, value)
    keys.only(**{key: keys.left.get(value, value) if value in USUAL.values() else value
                 for key, value in says.get("only", {}).items()})

    # 2. The letters.
    numbers: dict = {letter: 0 for letter in USUAL}
    mla = _latent(keys, says["mla"]) if "mla" in says else {}
    by = getattr(special, says["by"], None)
    fields = by(keys, says) if by else {}
    for letter in says.get("letters", USUAL):
        key, most = USUAL[letter], MAX_LAYERS if letter == "L" else 2**24
        usual = {"K": numbers["N"], "H": _head(keys, numbers)}.get(letter)
        numbers[letter] = keys.whole(key, usual, most=most)
    if "letters" not in says:
        numbers["max_context"] = keys.whole("max_position_embeddings")
    numbers |= {"tied": keys.flag("tie_word_embeddings", False)} | mla | fields

    # 3. Which matrices have biases, and what is fixed.
    biases = []
    for rule in says.get("biases", []):
        matrices, _, key = rule.partition(": ")
        if not key or keys.flag(key, False):
            biases += matrices.split()
    numbers["biases"] = tuple(dict.fromkeys(biases))
    for rule in says.get("flags", []):
        field, _, key = rule.partition(": ")
        numbers[field] = keys.flag(key, False)
    for field, value in says.get("shape", {}).items():
        numbers.setdefault(field, numbers["max_context"] if isinstance(value, str)
                           and field == "positions" else value)
    if numbers.get("qk_norm") == "whole":               # a norm of width N*H and one of K*H
        numbers["qk_norm"], heads = False, numbers["N"] + numbers["K"]
        numbers["extra"] = numbers.get("extra", 0) + numbers["L"] * heads * numbers["H"]

    # 4. Kinds of layers, and experts in them.
    numbers |= _kinds(keys, says, numbers, numbers.pop("usual", None))
    if "experts" in says:
        numbers = experts(keys, says["experts"], numbers)
    return numbers


def _absent(keys: Keys, value: object) -> object:
    """"4 * hidden_size" is four times what that key says."""
    if not isinstance(value, str):
        return value
    times, _, key = value.partition(" * ")
    keys.left[key] = whole = keys.whole(key)
    return int(times) * whole


def _head(keys: Keys, numbers: dict) -> int | None:
    """What a missing head_dim means: D/N, if that is a whole number."""
    D, N = numbers["D"], numbers["N"]
    if N and D % N and keys.name("num_attention_heads") != "num_attention_heads":
        keys.refuse("num_attention_heads", N, f"a divisor of {keys.name('hidden_size')} = {D}")
    return D // N if N and D % N == 0 else None


def _latent(keys: Keys, manner: str) -> dict:
    nope, rope = keys.whole("qk_nope_head_dim"), keys.whole("qk_rope_head_dim")
    index = (keys.whole("index_n_heads"), keys.whole("index_head_dim"), keys.whole("index_topk")
             ) if manner == "indexed" else ()
    query = keys.whole("q_lora_rank", 0, least=0) or None
    keys.left["head_dim"] = nope + rope
    return {"mla": MLA(keys.whole("kv_lora_rank"), rope, keys.whole("v_head_dim"), query, *index)}


def _kinds(keys: Keys, says: dict, numbers: dict, usual: Sequence[str] | None) -> dict:
    """`window` and `pattern`. What the file says layer by layer goes before what is usual; a window
    that no layer looks through is none."""
    L, window, per = numbers["L"], numbers.get("window"), None
    shared = numbers.pop("shared", ())
    if "windows" in says:
        window = keys.whole("sliding_window", 0, least=0) or None
        usual = usual or says["windows"]
        for key in ("sliding_window_pattern", "_sliding_window_pattern"):
            per = keys.take(key, per)
        if isinstance(per, str) and per and set(per) <= set("LG"):
            usual = [{"L": "local", "G": "global"}[letter] for letter in per]
        elif per is not None:
            keys.left[key] = per
            usual = ["local"] * (keys.whole(key) - 1) + ["global"]
    usual = usual or ["global"]
    kinds = [usual[i % len(usual)] for i in range(L)]
    if not window:
        kinds = [kind.replace("local", "global") for kind in kinds]
    words = WORDS | says.get("layers", {})
    types = keys.one_each("layer_types", L, tuple(words))
    said = [words[kind] for kind in types] or kinds
    if said != kinds and (set(usual) == {"local"} or not window and "local" in said):
        keys.refuse("layer_types", types, f"what agrees with a window of {window}")
    said = [f"{kind} shared" if i in shared else kind for i, kind in enumerate(said)]
    return {"window": window if any(kind.startswith("local") for kind in said) else None,
            "pattern": shortest(said)}


def shortest(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that gives these layers when repeated; empty where a ModelShape needs
    none."""
    length = next(n for n in range(1, len(kinds) + 1)
                  if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return () if length == 1 and kinds[0] in ("global", "local") else tuple(kinds[:length])


def experts(keys: Keys, says: dict, numbers: dict) -> dict:
    """The numbers with their experts, if there are any. Where no layer has a plain MLP, F is the
    experts' own width."""
    # 1. How many, how wide.
    L, least = numbers["L"], says.get("least", 1)
    count = keys.whole(says["experts"], least=0)
    active = keys.whole(says["active"], 0 if not count else None, least=0)
    width = keys.whole(says["F"]) if count and "F" in says else numbers["F"]
    if "shared_count" in says:
        shared = keys.whole(says["shared_count"], 0, least=0) * width
    else:
        shared = keys.whole(says["shared"], 0, least=0) if "shared" in says else 0

    # 2. In which layers.
    more = numbers.pop("of_moe", {})
    first = keys.whole(says["first_dense"], 0, least=0) if "first_dense" in says else 0
    every = keys.whole(says["every"], 1) if "every" in says else 1
    plain = keys.indices("mlp_only_layers", keys.take("mlp_only_layers", []), L)
    types = keys.one_each("mlp_layer_types", L, ("dense", "sparse"))
    sparse = numbers.pop("sparse", None) or [
        kind == "sparse" for kind in types] or [
        i >= first and (i + 1) % every == 0 and i not in plain for i in range(L)]
    if count < least or not any(sparse):
        return numbers
    own = width if not all(sparse) and width != numbers["F"] else None
    moe = MoE(count, active, own, shared, says.get("shared_gate", False) and bool(shared),
              **_where(sparse), **more)
    return numbers | {"F": numbers["F"] if not all(sparse) else width, "moe": moe}


def _where(sparse: Sequence[bool]) -> dict:
    """Which layers have experts, in the words of MoE: all, all from one on, every so many, or a
    list."""
    first = sparse.index(True)
    if all(sparse[first:]):
        return {"first_dense": first}
    for every in range(2, 9):
        if all(has == (i % every == first) for i, has in enumerate(sparse)):
            return {"every": every, "offset": first}
    return {"layers": tuple(i for i, has in enumerate(sparse) if has)}
