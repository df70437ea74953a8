"""Recipes and schemes in a few words."""

from __future__ import annotations

from int8pass.recipe import PRESETS, Recipe, Scheme, SiteSettings


def describe_scheme(scheme: Scheme, blocks: bool = False) -> str:
    """One or two words per choice: `w8a8 affine, largest columns`; `blocks`: of outliers, in place of columns that
    every call chooses (`int8pass.hilo`)."""
    weights = {"group": f", groups of {scheme.group_size}", "per_tensor": ", one weight scale"}.get(scheme.weights, "")
    weights += ", gptq" if scheme.rounding == "gptq" else ""
    if scheme.activations == "none":
        return f"w8a16{weights}{', static columns' if scheme.outliers == 'static' else ''}"
    columns = {"none": "", "largest": ", largest columns", "static": ", static columns"}
    outliers = ", outlier blocks" if blocks else columns.get(scheme.outliers, f", columns > {scheme.threshold:g}")
    ranges = {"per_tensor": ", per tensor", "static": ", static range"}.get(scheme.activations, "")
    return f"w8a8 {'symmetric' if scheme.symmetric else 'affine'}{ranges}{weights}{outliers}"


def describe(recipe: Recipe) -> str:
    """The recipe in one line: its preset if it is one, and the fields."""
    name = next((name for name, scheme in PRESETS.items() if scheme == recipe.scheme), "custom")
    parts = [describe_scheme(recipe.scheme)]
    if recipe.quantize_head:
        parts.append("head quantized")
    calibrated = sum(1 for settings in recipe.sites.values() if settings.calibrated)
    own = sum(1 for settings in recipe.sites.values() if settings.scheme is not None or settings.keep)
    if calibrated:
        parts.append(f"{calibrated} sites calibrated")
    if own:
        parts.append(f"{own} sites with settings of their own")
    return f"{name} ({', '.join(parts)})"


def alpha_of(settings: SiteSettings, scheme: Scheme) -> float | None:
    """α of a smoothed site: what calibration used, 1/2 where smoothing is data-free (`int8pass.smooth`).

    None: calibration chose a vector of another form (`int8pass.calibration.smoothing.outlier_exponents`).
    """
    return settings.alpha if scheme.smoothing == "calibrated" else 0.5


def how_smoothed(settings: SiteSettings, reason: str, has_vector: bool) -> str:
    """`SiteRow.smoothing` from the reason against a fold ("": none) and whether there is a vector."""
    if not has_vector:
        return reason
    if settings.exponents and not any(settings.exponents):
        return ""
    return "multiply" if reason else "folded"


__all__ = ["alpha_of", "describe", "describe_scheme", "how_smoothed"]
