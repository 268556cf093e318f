"""The formats that a config states: of the weights, part by part, and of the KV cache."""

import math
import re
from fnmatch import fnmatchcase
from typing import Any

from clawdemy_infer.arithmetic import BYTES, Format, ModelShape
from clawdemy_infer.arithmetic.work import Mixed
from clawdemy_infer.from_config.keys import TEXT, Keys, tables
from clawdemy_infer.paths import Refused

MAX_PATTERNS = 5_000            # names of modules in a file, where experts count as one

Group = tuple[list[str], float, str]
"""Names of modules, bytes of a weight in them, and what that is called."""


def stated(config: dict[str, Any], shape: ModelShape, source: str) -> tuple[Format, Format]:
    """Formats of the weights and of the KV cache, as the keys of a config state them. Of a part
    that has a format in some layers alone it is the mean. Embedding, router, and norms are as
    `dtype` says. Refused for a method or a key that is not known."""
    # 1. What is not quantized.
    text = next((config[key] for key in TEXT if isinstance(config.get(key), dict)), {})
    named = next((one[key] for one in (text, config) for key in ("dtype", "torch_dtype")
                  if one.get(key)), "bfloat16")
    page = tables()["_quantization"]
    base = page["dtypes"].get(str(named).removeprefix("torch."))
    if not base:
        raise Refused(source, "dtype", named, ", ".join(page["dtypes"]))
    key = "quantization_config"
    keys = Keys({key: config.get(key) or text.get(key)}, source).inner(key)
    if not keys.left:
        return base, base

    # 2. What is, and what the file says of the cache.
    ignored = list(dict.fromkeys(
        _one_expert(name) for name in sum((keys.words(key) for key in (
            "ignore", "exclude_modules", "modules_to_not_convert", "llm_int8_skip_modules")), [])))
    groups, head = _groups(keys)
    if sum(len(names) for names, _, _ in groups) + len(ignored) > MAX_PATTERNS:
        keys.refuse("ignore", len(ignored), f"{MAX_PATTERNS:,} names of modules at most")
    scheme, kv = keys.inner("kv_cache_scheme"), base
    if scheme.left:
        bits, kind = scheme.whole("num_bits", most=16), scheme.take("type", "int")
        keys.left["kv_cache_quant_algo"] = f"{'FP' if kind == 'float' else 'INT'}{bits}"
    if keys.left.get("kv_cache_quant_algo"):
        kv = page["caches"][keys.one_of("kv_cache_quant_algo", page["caches"])]
    keys.settle(page["harmless"].split(), "no such key, since it may change what the weights weigh")

    # 3. The parts.
    formats = {part: _mean(shape, part, groups, ignored, base) for part in page["modules"]}
    if head and not _covered(ignored, ["lm_head"]):
        formats["head"] = next((bytes for names, bytes, _ in groups
                                if _covered(names, ["lm_head"])), base)
    named = sorted({name for _, _, name in groups})
    parts = [(matrix, formats[part]) for part, names in page["matrices"].items()
             if formats.get(part, base) != base for matrix in names.split()]
    return Mixed(" + ".join(named), base, tuple(parts)), kv


def _groups(keys: Keys) -> tuple[list[Group], bool]:
    """What has which format, and whether the head may."""
    methods = tables()["_quantization"]["methods"].split()
    method, head = keys.one_of("quant_method", methods, "modelopt"), keys.flag("lm_head", False)
    if method in ("fp8", "fbgemm_fp8"):
        block = keys.left.get("weight_block_size") and keys.listed(
            "weight_block_size", lambda one: type(one) is int and one > 0,
            "rows and columns of a block, above 0", least=2, most=2)
        return [(["*"], 1 + (4 / math.prod(block) if block else 0), "fp8")], head
    keys.drop("weight_block_size")
    if method == "mxfp4":
        return [(["*experts*"], _bytes(4, 8, 32), "mxfp4")], head
    if method in ("gptq", "awq"):
        keys.rename("w_bit", "bits")
        keys.rename("q_group_size", "group_size")
        keys.left.setdefault("group_size", 128)
        bits, group = keys.whole("bits", 4, most=8), _group_size(keys)
        return [(["*"], _bytes(bits, 16 + bits, group), f"{method} int{bits}")], head
    if method == "bitsandbytes":
        four = any([keys.flag("load_in_4bit", False), keys.flag("_load_in_4bit", False)])
        eight = any([keys.flag("load_in_8bit", False), keys.flag("_load_in_8bit", False)])
        if four == eight:
            keys.refuse("load_in_4bit", four, "one of load_in_4bit and load_in_8bit")
        return [(["*"], _bytes(4, 32, 64) if four else 1.0, "nf4" if four else "int8")], head
    layers, groups = keys.inner("quantized_layers"), keys.inner("config_groups")
    if layers.left:
        by: dict[tuple[float, str], set[str]] = {}
        for name, one in list(layers.left.items()):
            said = layers.inner(name) if isinstance(one, dict) else Keys({"quant_algo": one},
                                                                         layers.source)
            by.setdefault(_algorithm(said), set()).add(_one_expert(name))
        return [(sorted(names), *one) for one, names in by.items()], True
    if groups.left:
        return [_group(groups.inner(name)) for name in list(groups.left)], True
    return [(["*"], *_algorithm(keys))], True


def _one_expert(name: str) -> str:
    return re.sub(r"experts\.\d+", "experts.0", name)


def _algorithm(keys: Keys) -> tuple[float, str]:
    known = tables()["_quantization"]["bits"]
    name = keys.one_of("quant_algo", known)
    return _bytes(*known[name]), name.lower()


def _group(keys: Keys) -> Group:
    """One of config_groups: bits and kind of its weights, and the modules that have them."""
    weights = keys.inner("weights")
    bits, kind = weights.whole("num_bits", most=16), weights.one_of("type", ("int", "float"), "int")
    group = _group_size(weights)
    targets = ["*" if name == "Linear" else name for name in keys.words("targets") or ["Linear"]]
    if kind == "int":
        return targets, _bytes(bits, 16, group), f"int{bits}"
    name = {(4, 16): "nvfp4", (4, 32): "mxfp4"}.get((bits, group), f"fp{bits}")
    return targets, _bytes(bits, 8, group), name


def _group_size(keys: Keys) -> int:
    """Weights that share a scale; 0 where -1 or nothing says that a whole row does."""
    if keys.left.get("group_size") == -1:
        keys.drop("group_size")
    return keys.whole("group_size", 0, least=0)


def _bytes(bits: int, scale: int, group: int) -> float:
    return (bits + (scale / group if group else 0)) / 8


def _mean(shape: ModelShape, part: str, groups: list[Group], ignored: list[str],
          base: Format) -> Format:
    """The format of a part, or the mean of its bytes over the layers that have it."""
    plain, modules = BYTES[base], tables()["_quantization"]["modules"][part].split()
    layers = [i for i, kind in enumerate(shape.kinds) if _has(shape, part, i, kind)]
    found = dict.fromkeys(layers, plain)
    for patterns, bytes, _ in [*reversed(groups), (ignored, plain, "")]:
        covered = _covered(patterns, modules)
        found |= {i: bytes for i in layers if None in covered or i in covered}
    return base if set(found.values()) <= {plain} else sum(found.values()) / len(found)


def _has(shape: ModelShape, part: str, i: int, kind: str) -> bool:
    sparse = bool(shape.moe and shape.moe.in_layer(i))
    feeds = not kind.endswith(" alone") or kind.startswith("mlp")
    return {"attention": kind[:3] not in ("ssm", "mlp"), "state": kind.startswith("ssm"),
            "mlp": feeds and not sparse, "expert": feeds and sparse,
            "shared": feeds and sparse and bool(shape.moe and shape.moe.shared)}[part]


def _covered(patterns: list[str], modules: list[str]) -> set[int | None]:
    """The layers whose module one of the patterns means, None for all: a glob, "re:" and an
    expression, of which stars and alternatives are read, or a name that is a part of the module's.
    """
    found = set()
    for pattern in patterns:
        if pattern.startswith("mtp"):                       # draft layers, which are not counted
            continue
        layer = re.search(r"\blayers\.(\d+)", pattern)
        text = re.sub(r"^.*\blayers\.", "layers.", pattern.removeprefix("re:"))
        if pattern.startswith("re:"):
            text = re.sub(r"[\^$]", "", text.replace("\\.", ".").replace(".*", "*")) + "*"
        within = "" if modules == ["lm_head"] else f"layers.{layer[1] if layer else 0}."
        names = [within + one for one in modules]
        either = re.search(r"\(([^()]*)\)", text)
        for one in either[1].split("|") if either else [""]:
            glob = text[:either.start()] + one + text[either.end():] if either else text
            if any(fnmatchcase(name, glob) or f".{glob}." in f".{name}." for name in names):
                found.add(int(layer[1]) if layer else None)
    return found
