"""The rotary embeddings that a `config.json` describes."""

import math
from collections.abc import Mapping
from typing import Any

from adpo_jax.hf import gemma4
from adpo_jax.hf.families import Family
from adpo_jax.hf.values import cure, is_number, wrong
from adpo_jax.model.rope import Rope

# The keys that transformers reads for each rope type.
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "longrope": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    },
    "proportional": {"factor"},
}
REQUIRED_ROPE_KEYS = {
    "default": set(),
    "linear": ROPE_KEYS["linear"],
    "llama3": ROPE_KEYS["llama3"],
    "yarn": set(),
    "longrope": {"short_factor", "long_factor"},
    "proportional": set(),
}
ROPE_LISTS = {"short_factor", "long_factor"}
ROPE_NUMBERS = set().union(
    *ROPE_KEYS.values(), {"rope_theta", "partial_rotary_factor", "llama_4_scaling_beta"}
) - {"truncate", *ROPE_LISTS}
# Keys that transformers does not read for a rope type are ignored, as transformers does. All other
# keys are refused.
KNOWN_ROPE_KEYS = set().union(*ROPE_KEYS.values(), {"rope_theta", "rope_type", "type", "finetuned"})


def check_no_rope_layers(c: Mapping[str, Any], num_layers: int) -> None:
    """Refuses a list that does not say of every layer whether it has a rope."""
    listed = c.get("no_rope_layers")
    # Files of Llama 4 have an empty list for none.
    if listed is None or (listed == [] and c["model_type"] == "llama4_text"):
        return
    if not isinstance(listed, list | tuple) or not all(x in (0, 1) for x in listed):
        raise wrong(c, "no_rope_layers", "a list of 1 (with a rope) and 0 (without), or null")
    if len(listed) < num_layers:
        raise ValueError(f"{len(listed)} no_rope_layers for num_hidden_layers = {num_layers}")


def ropes(
    family: Family, c: Mapping[str, Any], layer_types: list[str], max_length: int | None
) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    """The distinct ropes, and each layer's index into them."""
    if family.rope_by_kind:
        distinct = _ropes_by_kind(family, c, layer_types, max_length)
        layer_ropes = [int(kind == "sliding_attention") for kind in layer_types]
    else:
        spellings = [p for p in (c["rope_scaling"], c["rope_parameters"]) if p] or [{}]
        rope, *others = (_rope(family, c, p, c["rope_theta"], max_length) for p in spellings)
        if others and others != [rope]:
            raise ValueError(f"rope_scaling ({rope}) and rope_parameters ({others[0]}) disagree")
        distinct, layer_ropes = (rope,), [0] * len(layer_types)
    without = [i for i in range(len(layer_types)) if not family.rotates(c, i)]
    for i in without:
        layer_ropes[i] = len(distinct)
    if without:
        grows = family.scale_of_no_rope(c)
        distinct += (Rope(kind="none", partial=distinct[0].partial, **grows),)
    return distinct, tuple(layer_ropes)


def _ropes_by_kind(
    family: Family, c: Mapping[str, Any], layer_types: list[str], max_length: int | None
) -> tuple[Rope, Rope]:
    nested = c["rope_parameters"] or family.defaults["rope_parameters"] or {}
    flat = sorted(nested.keys() - {"full_attention", "sliding_attention"})
    if flat:
        raise ValueError(
            f"rope_parameters of {c['model_type']} has one entry for full_attention and one for "
            f"sliding_attention; given {flat}"
        )
    for kind in nested:
        if not isinstance(nested[kind] or {}, Mapping):
            raise wrong(nested, kind, "an object inside rope_parameters")
    local = nested.get("sliding_attention") or {}
    distant = {**(nested.get("full_attention") or {}), **(c["rope_scaling"] or {})}
    local_theta = c.get("rope_local_base_freq", c["rope_theta"])
    usual = family.defaults["rope_theta"]
    own = "rope_theta" in local or "rope_theta" in distant or "rope_local_base_freq" in c
    if c["rope_theta"] != usual and not own and "sliding_attention" in layer_types:
        # transformers gives it to the layers of full attention and takes no second look.
        raise ValueError(
            f"rope_theta = {c['rope_theta']!r:.80} of {c['model_type']} is read in two ways: "
            f"transformers 5 leaves the layers of sliding_attention at {usual}; give each kind of "
            "layer its rope_theta inside rope_parameters"
        )
    distant_settings = c
    if c["model_type"] == "gemma4_text":
        _, head_dim = gemma4.global_sizes(c, layer_types)
        distant_settings = {**c, "head_dim": head_dim}
    return (
        _rope(family, distant_settings, distant, c["rope_theta"], max_length),
        _rope(family, c, local, local_theta, max_length),
    )


def _rope(
    family: Family,
    c: Mapping[str, Any],
    parameters: Mapping[str, Any],
    theta: float,
    max_length: int | None,
) -> Rope:
    """One rope; `theta` is its base if the parameters have none."""
    max_positions = c["max_position_embeddings"]
    given = {key: value for key, value in parameters.items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    kind = family.rope_types.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ValueError(
            f"rope type {kind!r:.80} is not supported; supported: {', '.join(ROPE_KEYS)}"
        )
    partial = given.pop("partial_rotary_factor", c.get("partial_rotary_factor") or 1.0)
    reads_partial = kind == "proportional" or "partial_rotary_factor" in family.defaults
    if not reads_partial and partial != 1.0:
        raise ValueError("partial_rotary_factor of the rope is not supported; supported: 1.0")
    unknown = sorted(given.keys() - KNOWN_ROPE_KEYS - family.rope_keys)
    if unknown:
        raise ValueError(
            f"rope settings that are not implemented: {', '.join(unknown)[:300]}. "
            + cure(_without(c, unknown[0]))
        )
    _check_rope_values({**given, "partial_rotary_factor": partial})
    theta = given.get("rope_theta", theta)
    used = {key: value for key, value in given.items() if key in ROPE_KEYS[kind]}
    if kind in ("llama3", "yarn", "longrope"):
        used.setdefault("original_max_position_embeddings", max_positions)
        if c.get("original_max_position_embeddings"):
            used["original_max_position_embeddings"] = c["original_max_position_embeddings"]
        if not is_number(used["original_max_position_embeddings"]):
            raise ValueError(
                f"rope type {kind!r} needs original_max_position_embeddings, or else "
                "max_position_embeddings, as a number above 0; given "
                f"{used['original_max_position_embeddings']!r:.80}"
            )
    if kind in ("yarn", "longrope"):
        used.setdefault("factor", max_positions / used["original_max_position_embeddings"])
        if not is_number(used["factor"]):
            raise ValueError(
                f"rope type {kind!r} needs factor, or else max_position_embeddings, as a number "
                f"above 0; given {max_positions!r:.80}"
            )
    if kind == "yarn":
        used.setdefault("attention_factor", _yarn_attention_factor(used))
    missing = sorted(REQUIRED_ROPE_KEYS[kind] - used.keys())
    if missing:
        raise ValueError(f"rope type {kind!r} needs {', '.join(missing)}")
    if kind == "longrope":
        _choose_frequencies(used, max_length or max_positions)
    used.pop("mscale", None)
    used.pop("mscale_all_dim", None)
    if "original_max_position_embeddings" in used:
        used["original_length"] = used.pop("original_max_position_embeddings")
    if "llama_4_scaling_beta" in given:
        used["query_beta"] = given["llama_4_scaling_beta"]
        used["query_length"] = given.get("original_max_position_embeddings", max_positions)
    rope = Rope(theta=float(theta), kind=kind, partial=float(partial), **used)
    dimensions = rope.dimensions(c["head_dim"])
    if dimensions % 2 or not dimensions:
        raise ValueError(
            f"partial_rotary_factor {partial} of head_dim {c['head_dim']} rotates {dimensions} "
            "dimensions; an even number above 0 is needed"
        )
    if rope.factors and len(rope.factors) != dimensions // 2:
        raise ValueError(
            f"the rope has {len(rope.factors)} factors in short_factor or long_factor; "
            f"{dimensions // 2} are needed, half of the rotated dimensions"
        )
    return rope


def _without(c: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """An override that leaves a setting of a rope out, in the first place that has it."""
    null = {setting[:80]: None}
    for name in ("rope_scaling", "rope_parameters"):
        given = c[name] or {}
        if given.get(setting) is not None:
            return {name: null}
        for kind, inner in given.items():
            if isinstance(inner, Mapping) and inner.get(setting) is not None:
                return {name: {kind: null}}
    raise AssertionError(f"no rope has {setting!r}")


def _check_rope_values(given: Mapping[str, Any]) -> None:
    for key in sorted(given.keys() & ROPE_NUMBERS):
        if not is_number(given[key]):
            raise ValueError(f"the rope needs {key} as a number above 0; given {given[key]!r:.80}")
    for key in sorted(given.keys() & ROPE_LISTS):
        if not isinstance(given[key], list | tuple) or not all(map(is_number, given[key])):
            raise ValueError(
                f"the rope needs {key} as a list of numbers above 0; given {given[key]!r:.80}"
            )
    if not given["partial_rotary_factor"] <= 1:
        raise ValueError(
            "the rope needs partial_rotary_factor as a number of at most 1; given "
            f"{given['partial_rotary_factor']!r:.80}"
        )


def _choose_frequencies(longrope: dict[str, Any], max_length: int) -> None:
    """Puts one set of factors, and the scale of cos and sin, in place of the settings of LongRoPE.

    Sequences within the original length have one set of factors and longer ones another. Keys in a
    cache cannot change theirs when a sequence grows, so that one set serves a whole run.

    Source: transformers `_compute_longrope_parameters`.
    """
    original, factor = longrope["original_max_position_embeddings"], longrope.pop("factor")
    short, long = (tuple(map(float, longrope.pop(f"{key}_factor"))) for key in ("short", "long"))
    longrope["factors"] = long if max_length > original else short
    if "attention_factor" not in longrope:
        stretch = math.log(factor) / math.log(original) if factor > 1 and original > 1 else 0.0
        longrope["attention_factor"] = math.sqrt(1 + stretch)


def _yarn_attention_factor(yarn: Mapping[str, Any]) -> float:
    """Source: transformers `_compute_yarn_parameters`."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(yarn["factor"]) + 1.0 if yarn["factor"] > 1 else 1.0

    if yarn.get("mscale") and yarn.get("mscale_all_dim"):
        return mscale(yarn["mscale"]) / mscale(yarn["mscale_all_dim"])
    return mscale(1.0)
