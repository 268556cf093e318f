"""The numbers of a ModelShape from the keys of a config.json, as `data/families.toml` says for each
family; its first lines say what an entry means."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from clawdemy_infer.arithmetic import MLA, SSM, MoE
from clawdemy_infer.from_config.keys import Keys, tables

MAX_LAYERS = 1000


@cache
def family(name: str) -> dict:
    """All that holds for the family `name`, what it is like included."""
    own = tables()[name]
    found = dict(family(own["like"] if "like" in own else "_decoder")) if name[0] != "_" else {}
    for entry, value in own.items():
        if isinstance(value, dict):
            value = found.get(entry, {}) | value
        found[entry] = [*found.get(entry, ()), *value] if entry == "harmless" else value
    return found


class Names(dict):
    """What a formula may name: letters that are read, and keys, each asked for once. A key is true
    or false where that is what its absence means, else a whole number."""

    def __init__(self, keys: Keys, says: dict) -> None:
        super().__init__(min=min, max=max, range=range)
        self.keys, self.absent = keys, says.get("absent", {})

    def __missing__(self, key: str) -> int | bool | None:
        usual, least = self.absent.get(key), int(key not in tables()["_harmless"]["zero"].split())
        value = self.keys.left.get(key)
        if value == "auto":
            del self.keys.left[key]
        elif isinstance(value, list) and value and value.count(value[0]) == len(value):
            self.keys.left[key] = value[0]              # the same for each layer
        default = usual if self.keys.left.get(key) is None else None
        if isinstance(default, str) and default:
            default = self.formula(default)
            if default is None:
                self.keys.refuse(key, None, "a whole number")
        if isinstance(usual, bool):
            self[key] = self.keys.flag(key, usual)
        elif type(default) is int and default == 0:
            self[key] = 0
        else:
            self[key] = self.keys.whole(key, default or None, least=0 if usual == 0 else least)
        return self[key]

    def formula(self, text: object) -> object:
        """The value of a formula; what is no text is its own value. The formulas are ours."""
        if not isinstance(text, str):
            return text
        return eval(text, {"__builtins__": {}}, self)


def read(name: str, keys: Keys) -> dict:
    """The fields of the ModelShape of a config of the family `name`. What is left in `keys` nobody
    asked for."""
    # 1. The keys under their usual names.
    says = family(name)
    for key in says.get("lift", ()):
        lifted = keys.inner(key)
        lifted.drop(*" ".join(tables()["_harmless"].values()).split())
        keys.left |= {f"{key}.{inner}": value for inner, value in lifted.left.items()}
    layers = keys.inner("per_layer_config")
    for layer in list(layers.left):                     # those that see all; they say the same
        for key, value in layers.inner(layer).left.items():
            keys.left["per_layer_config"] = value
            keys.rename("per_layer_config", {
                "head_dim": "global_head_dim",
                "num_key_value_heads": "num_global_key_value_heads"}.get(key, key))
    for key, usual in says.get("says", {}).items():
        keys.rename(key, usual)
    if letters := keys.take("hybrid_override_pattern", ""):
        known = tables()["_layers"]["letters"]
        if not isinstance(letters, str) or set(letters) - set(known):
            keys.refuse("hybrid_override_pattern", letters, f"letters of {' '.join(known)}")
        keys.left["layer_types"] = keys.left.get("layer_types") or [known[one] for one in letters]
    if isinstance(types := keys.left.get("layer_types"), list | tuple) and types:
        types = [str(kind) if type(kind) is int else kind for kind in types]
        keys.left["layer_types"] = types
        L, drafts = (keys.left.setdefault("num_hidden_layers", len(types)),
                     keys.left.get("num_nextn_predict_layers"))
        if type(drafts) is int and len(types) - drafts == L:
            keys.left["layer_types"] = types[:L]        # without those of draft layers

    # 2. Letters and other fields. What a missing head_dim means is D/N, if that is a whole number.
    names, numbers = Names(keys, says), {}
    for field, formula in says["shape"].items():
        if field == "extra":                            # it may count the kinds of layers
            continue
        if formula == "head_dim" and not keys.left.get("head_dim"):
            D, N = numbers["D"], numbers["N"]
            if D % N and keys.said:
                keys.refuse("num_attention_heads", N,
                            f"a divisor of {keys.name('hidden_size')} = {D}")
            names.absent = {"head_dim": None if D % N else D // N} | {
                key: value for key, value in names.absent.items() if value != ""}
        numbers[field] = names[field] = names.formula(formula)
    L = numbers["L"]
    if L > MAX_LAYERS:
        keys.refuse("num_hidden_layers", L, f"{MAX_LAYERS} layers at most")
    numbers |= {"tied": bool(numbers["tied"]), "max_context": numbers["max_context"] or None}
    keys.only(**{key: names.formula(value[1:]) if str(value).startswith("=") else value
                 for key, value in says.get("only", {}).items()})
    rules = [rule.partition(": ") for rule in says.get("biases", ())]
    flags = {key: keys.flag(key, names.absent.get(key, False)) if key else True
             for _, _, key in rules}
    numbers["biases"] = tuple(dict.fromkeys(
        matrix for matrices, _, key in rules if flags[key] for matrix in matrices.split()))
    for key in keys.left.keys() & names.absent.keys() - {"sliding_window", "use_sliding_window",
                                                          "layer_types"}:
        names[key]                                      # no formula came to ask, but it is known

    # 3. Kinds of layers, the numbers of their mixers, and experts.
    types = keys.left.get("layer_types")
    if not types and says.get("absent", {}).get("layer_types") == "":
        keys.take("layer_types")
    numbers |= _kinds(keys, says, names, L, numbers.pop("shared", ()))
    numbers["extra"] = names.formula(says["shape"].get("extra", 0))
    for field, kind in (("mla", MLA), ("ssm", SSM)):
        if field in says:
            numbers[field] = kind(**{key: names.formula(value)
                                     for key, value in says[field].items()})
    if "float32" in [keys.left.get(f"mamba_ssm_{what}") for what in ("dtype", "cache_dtype")]:
        numbers |= {"ssm": replace(numbers["ssm"], format="fp32")} if "ssm" in numbers else {}
    if "experts" in says:
        sparse = [word == "moe" for word in types or ()] if "moe" in says.get("layers", ()) else []
        numbers = _experts(keys, says["experts"], names, numbers, sparse)
    return numbers


def _kinds(keys: Keys, says: dict, names: Names, L: int, shared: Sequence[int]) -> dict:
    """`window` and `pattern`; formulas find the `kinds` of all layers. What the file says layer by
    layer goes before what is usual; a window that no layer looks through is none."""
    usual, window = names.formula(says.get("usual", ["global"])), None
    if "local" in str(says.get("usual")):
        for key in ("sliding_window_pattern", "_sliding_window_pattern"):
            per = keys.left.get(key)
            if isinstance(per, str) and per and not set(per) - set("LG"):
                usual = [{"L": "local", "G": "global"}[letter] for letter in keys.take(key)]
            elif per is not None:
                usual = ["local"] * min(L, keys.whole(key) - 1) + ["global"]
        used = keys.flag("use_sliding_window", names.absent.get("use_sliding_window", True))
        window = (names["sliding_window"] if "sliding_window" in names.absent
                  else keys.whole("sliding_window", 0, least=0)) * used or None
    # Layers that are listed by number: those that attend, those whose positions turn.
    for key, base in (("attn_layer_indices", 0), ("full_attn_idxs", 0), ("full_attn_layers", 1)):
        if keys.left.get(key) and "ssm" in says:
            full = keys.indices(key, L + base)
            usual = ["global" if i + base in full else "ssm" for i in range(L)]
            keys.indices("kda_layers", L + 1)
    if "chunked_attention" in says.get("layers", ()) and keys.left.get("no_rope_layers"):
        usual = ["local" if turned else "global"
                 for turned in keys.one_each("no_rope_layers", L, (0, 1))]
    if "index" in says.get("mla", ()):
        kinds = keys.one_each("indexer_types", L, ("full", "shared"))
        shared = [i for i, kind in enumerate(kinds) if kind == "shared"]
    kinds = [usual[i % len(usual)] for i in range(L)]
    if not window:
        kinds = [kind.replace("local", "global") for kind in kinds]
    words = tables()["_layers"]["words"] | says.get("layers", {})
    said = [words[kind] for kind in keys.one_each("layer_types", L, tuple(words))] or kinds
    if said != kinds and (usual == ["local"] or not window and "local" in said):
        keys.refuse("layer_types", said, f"what agrees with a window of {window}")
    if "last" in says:
        said[-1] = says["last"]
    said = [f"{kind} shared" if i in shared else kind for i, kind in enumerate(said)]
    names["kinds"] = said
    return {"window": window if any(kind.startswith("local") for kind in said) else None,
            "pattern": shortest(said)}


def shortest(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that gives these layers when repeated; empty where a ModelShape needs
    none."""
    length = next(n for n in range(1, len(kinds) + 1)
                  if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return () if length == 1 and kinds[0] in ("global", "local") else tuple(kinds[:length])


def _experts(keys: Keys, says: dict, names: Names, numbers: dict, sparse: list[bool]) -> dict:
    """The numbers with their experts, if there are any. Where no layer has a plain MLP, F is the
    experts' own width, and `moe` need not say it."""
    L = numbers["L"]
    said = {field: names.formula(formula) for field, formula in says.items()}
    plain = keys.indices("mlp_only_layers", L)
    types = keys.one_each("mlp_layer_types", L, ("dense", "sparse", 0, 1))
    chosen, every = keys.indices("moe_layers", L), said.pop("sparse", [1])
    first = said.pop("first_dense", 0)
    sparse = sparse or [kind in ("sparse", 1) for kind in types] or [
        i in chosen if chosen else i >= first and bool(every[i % len(every)]) and i not in plain
        for i in range(L)]
    least = said.pop("least", 1)
    if said["experts"] < least or not any(sparse):
        return numbers
    width, plain_F = said.pop("F", numbers["F"]), numbers["F"]
    own = width if not all(sparse) and width != plain_F else None
    said["shared_gate"] = bool(said.get("shared_gate") and said["shared"])
    if said["active"] > said["experts"]:
        keys.refuse("active", said["active"], f"1 to {said['experts']} experts for each token")
    return numbers | {"F": width if all(sparse) else plain_F,
                      "moe": MoE(F=own, **said, **_where(sparse))}


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
