"""What every page that HemoFed writes has in common: templates that escape, and how figures are written."""

from jinja2 import ChoiceLoader, Environment, PackageLoader, PrefixLoader, StrictUndefined, select_autoescape

MINUS = "\u2212"
NOT_COMPUTED = "not computed"


def environment(package: str) -> Environment:
    """The templates of a package, and the common ones as `shared/NAME`; `number`, `count` and `percent` as filters.

    Guarantee: autoescape is on for every template, so that no text of a file can become markup.
    """
    own, shared = PackageLoader(package), PackageLoader("shared_model")
    made = Environment(
        loader=ChoiceLoader([own, PrefixLoader({"shared": shared})]),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (number, count, percent):
        made.filters[function.__name__] = function
    return made


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """A figure with a true minus sign; null is `not computed`."""
    if value is None:
        return NOT_COMPUTED
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("-", MINUS)


def count(value: int | None) -> str:
    """A count with thin spaces between thousands; null is `not shown`."""
    return "not shown" if value is None else f"{value:,}".replace(",", "\u202f")


def percent(value: float | None) -> str:
    """A share as a whole percentage."""
    return NOT_COMPUTED if value is None else f"{100 * value:.0f}%"
