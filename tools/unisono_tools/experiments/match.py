"""One config of each model with nearly the same number of parameters, for a fair comparison."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from unisono_spec.contract import Config, InputError, count_params, preset
from unisono_spec.contract import nearest as meant

PART = 200  # each within one in 200 of the target, so that any two agree within 1 %
LAYERS = range(1, 65)
WIDE = 32_000_000  # parameters from which heads are 64 wide, as matrix units like them
SHAPES = 1.8  # how many times wider or narrower for its depth than the presets a config may be
WIDEST = 1 << 15
MODEL = "transformer"  # whose head others have alike
HEADS = ("alike", "usual", "tied", "own")
Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """Configs of one kind: `base` with other widths and depths, and with one of each of the `options`, the preferred first.

    multiple: of d_model. spell, widen, deepen: the fields that follow from vocab_size, from d_model, from n_layers.
    """

    base: str
    options: dict[str, tuple[Any, ...]]
    multiple: int = 8
    spell: Callable[[int], Fields] = lambda vocab: {}
    widen: Callable[[int], Fields] = lambda d: {}
    deepen: Callable[[int], Fields] = lambda n: {}

    def config(self, vocab: int, d_model: int, n_layers: int, chosen: Fields) -> Config:
        fields = {**self.spell(vocab), **self.widen(d_model), **self.deepen(n_layers), **chosen}
        return preset(self.base, vocab_size=vocab, d_model=d_model, n_layers=n_layers, **fields)


def _codes(vocab: int) -> Fields:
    return {"code_bits": max(8, (vocab - 1).bit_length())}


def _heads(d_model: int) -> Fields:
    return {"head_width": math.gcd(d_model, 32)}


def _narrow_heads(d_model: int) -> Fields:
    return {"head_width": math.gcd(d_model, 16)}


def _number_of_heads(d_model: int) -> Fields:
    return {"n_heads": d_model // math.gcd(d_model, 32)}


def _wide_heads(d_model: int) -> Fields:
    return {"head_width": 64}


def _number_of_wide_heads(d_model: int) -> Fields:
    return {"n_heads": d_model // 64}


def _based(n_layers: int) -> Fields:
    """Of every five layers, the second is linear and the third a window."""
    return {"attention": tuple({1: "linear", 2: "window"}.get(i % 5, "conv") for i in range(n_layers))}


FAMILIES = {
    "cram (fixed)": Family("cram-demo", {"ffn_mult": (4, 3, 2), "head_bias": (False, True)}, spell=_codes),
    "cram (adaptive)": Family("cram-1m", {"ffn_mult": (4, 3, 2), "tie_head": (True, False)}),
    "cram-plus": Family("cram-plus", {"ffn_mult": (4, 3, 2), "tie_head": (True, False)}),
    "lat": Family("lat-1m", {"qk_width": (32, 24, 40), "ffn_mult": (4, 3), "bias": (True, False), "tie_head": (False, True)}, widen=_heads),
    "based": Family("based-1m", {"ffn_mult": (2, 3), "qk_width": (16, 8), "tie_head": (True, False)}, widen=_narrow_heads, deepen=_based),
    "infinityformer": Family("infinityformer-1m", {"d_ffn": (), "tie_head": (True, False)}, widen=_number_of_heads),
    "maru": Family("maru-1m", {"head_hidden": (), "n_slots": (64, 48, 80), "d_memory": (16, 12, 20)}),
    "transformer": Family("transformer-1m", {"ffn_mult": (4, 3, 5), "tie_head": (False, True)}, widen=_heads),
    "s4d": Family("s4d-1m", {"tie_head": (True, False), "d_state": (64, 32, 48, 80)}),
    "mamba": Family("mamba-1m", {"d_state": (16, 12, 20, 8), "tie_head": (True, False)}),
}


def _larger(name: str, widen: Callable[[int], Fields], **options: tuple[Any, ...]) -> Family:
    return dataclasses.replace(FAMILIES[name], options={**FAMILIES[name].options, **options}, multiple=64, widen=widen)


LARGE = {
    "lat": _larger("lat", _wide_heads, qk_width=(64, 48)),
    "based": _larger("based", _wide_heads, qk_width=(16,)),
    "infinityformer": _larger("infinityformer", _number_of_wide_heads),
    "transformer": _larger("transformer", _wide_heads),
}


def match(target: int, vocab: int, heads: str | None = None) -> dict[str, Config]:
    """By name, the config of each model whose count is within 0.5 % of `target`, shaped most like the presets of that size.

    heads: as of `nearest`. Raises InputError where a model has none, naming it and the nearest count.
    """
    return {name: nearest(name, target, vocab, heads) for name in FAMILIES}


def nearest(name: str, target: int, vocab: int, heads: str | None = None) -> Config:
    """That of one model.

    heads: where a family has both, logits come of the embedding's table ("tied") or of one of the head's "own", beside which the
    embedding's is looked up and costs no operation; "usual": as suits the count and the family's presets; "alike": as the
    Transformer's usual ones of that size, but for a family that has no such config. None: alike from 32M parameters on, where
    tables are large, and usual below.
    """
    if name not in FAMILIES:
        raise InputError(f"model: {name!r} is unknown; {meant(name, FAMILIES)}")
    if vocab < 1:
        raise InputError(f"vocab: {vocab}; use a positive integer, 256 for bytes")
    if target < 1:
        raise InputError(f"params: {target}; use a positive number, such as 1M or 125M")
    heads = heads or ("alike" if target >= WIDE else "usual")
    if heads not in HEADS:
        raise InputError(f"heads: {heads!r} is unknown; {meant(heads, HEADS)}")
    family = LARGE.get(name, FAMILIES[name]) if target >= WIDE else FAMILIES[name]
    if "tie_head" in family.options and heads in ("tied", "own"):
        try:
            return _nearest(name, _with_heads(family, heads == "tied"), target, vocab)
        except InputError as error:
            raise InputError(f"{error}, or for heads alike") from None
    if "tie_head" in family.options and heads == "alike" and name != MODEL:
        with contextlib.suppress(InputError):
            tied = nearest(MODEL, target, vocab, "usual").to_dict()["tie_head"]
            return _nearest(name, _with_heads(family, tied), target, vocab)
    return _nearest(name, family, target, vocab)


def _with_heads(family: Family, tied: bool) -> Family:
    return dataclasses.replace(family, options=family.options | {"tie_head": (tied,)})


def _nearest(name: str, family: Family, target: int, vocab: int) -> Config:
    base = preset(family.base)
    # a model of twice the size is usually wider rather than deeper
    shape = base.d_model / base.n_layers * (target / count_params(base)) ** 0.2
    depths: list[tuple[float, int]] = []  # how far their shapes are at least, with the preferred options
    preferred = next(_choices(family))
    for n_layers in LAYERS:
        widths = [config.d_model for config in _around(family, target, vocab, n_layers, preferred)]
        if not widths or max(widths) / n_layers < shape / SHAPES:
            break
        if min(widths) / n_layers <= shape * SHAPES:
            depths.append((min(abs(math.log(width / n_layers / shape)) for width in widths), n_layers))
    best: tuple[float, int, int, Config] | None = None
    closest = math.inf
    for _, n_layers in sorted(depths):
        for rank, chosen in enumerate(_choices(family)):
            if best is not None and 0.1 * rank > best[0]:  # whatever its shape
                break
            for config in _around(family, target, vocab, n_layers, chosen):
                count = count_params(config)
                closest = count if abs(count - target) < abs(closest - target) else closest
                if target - target // PART <= count <= target + target // PART:
                    one = abs(math.log(config.d_model / n_layers / shape)) + 0.1 * rank, n_layers, rank
                    best = (*one, config) if best is None or one < best[:3] else best
    if best is None:
        raise _none(name, base, target, vocab, closest)
    return best[3]


def _none(name: str, base: Config, target: int, vocab: int, reached: float) -> InputError:
    """reached: the nearest count that a shape has, infinite where no shape is near."""
    near = "" if math.isinf(reached) else f", the nearest {reached:,}"
    usual = count_params(base) + (vocab - base.vocab_size) * base.d_model if math.isinf(reached) else reached
    remedy = "more" if usual > target else "fewer"
    return InputError(f"params: no {name} model of {vocab} ids has within 0.5 % of {target:,}{near}; ask for {remedy}")


def _choices(family: Family) -> Iterator[Fields]:
    """Every combination of the options that do not follow from the width, the preferred first."""
    names = [name for name, values in family.options.items() if values]
    for values in itertools.product(*(family.options[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def _around(family: Family, target: int, vocab: int, n_layers: int, chosen: Fields) -> Iterator[Config]:
    """The widest config below the target and the narrowest above it; with a free width inside, fitted to the target."""
    free = next((name for name, values in family.options.items() if not values), None)

    def config(step: int, **more: Any) -> Config:
        d = step * family.multiple
        start = {} if free is None else {free: 4 * d if free == "d_ffn" else d}
        return family.config(vocab, d, n_layers, {**start, **chosen, **more})

    def fits(step: int) -> bool:
        # no layer has fewer parameters than a square matrix: most of what is too wide need not be counted
        return n_layers * (step * family.multiple) ** 2 <= target and count_params(config(step)) <= target

    low, high = 1, WIDEST // family.multiple
    if not fits(low):
        return
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    for step in (low, high):
        made = config(step)
        if free is not None:
            # the count is linear in it
            start = getattr(made, free)
            slope = count_params(config(step, **{free: start + 1})) - count_params(made)
            unit = 16 if family.multiple == 64 else 1  # rows of large matrices, as matrix units like them
            fitted = (start + round((target - count_params(made)) / slope)) // unit * unit
            made = config(step, **{free: fitted}) if start / 2 <= fitted <= 2 * start else made
        yield made
