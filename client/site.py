"""What a hospital sets for itself: `site.toml` in the site folder. The hospital's word is the last."""

import json
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.quality_policy import QualityPolicy
from shared_model.errors import ExitCode, HemoFedError

SITE_FILE = "site.toml"
Disclosure = Literal["clear", "masked", "noised"]


class SiteSettings(BaseModel):
    """The settings of one site. `disclosure` has no default: a site that did not say releases nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=60, pattern=r"^[\w .\-]+$")
    disclosure: Disclosure
    """How counts leave: as they are (with small cells suppressed), inside a secure sum, or with noise."""
    minimum_cell: int = Field(default=11, ge=1)
    """A count of fewer patients than this is suppressed."""
    count_rounding: int = Field(default=5, ge=1)
    share_site_results: bool = True
    """Whether this site's own figures may be shown, or only those of all sites together."""
    simulated: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    physical_batch: int | None = Field(default=None, ge=1)
    """ECGs in memory at once; None lets the study's batch size decide."""
    quality: QualityPolicy = QualityPolicy()
    """What an ingest does with ECGs of poor quality: the table `[quality]`."""


def load_site(site_dir: Path | str) -> SiteSettings:
    """Read and check `site.toml`.

    Guarantee: without a readable file that states `disclosure` there are no settings, so nothing can be
    released; no value is assumed for it.

    Raises:
        HemoFedError: the file is absent, not TOML, has an unknown key or a bad value, or lacks `disclosure`.
    """
    path = Path(site_dir) / SITE_FILE
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HemoFedError(
            f"{path}: cannot be read ({error.strerror}); write it with at least name and disclosure, or run "
            "hemofed-client ingest, which makes one",
            ExitCode.BAD_SITE,
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HemoFedError(f"{path}: not TOML: {error}; mend that line", ExitCode.BAD_SITE) from None
    try:
        return SiteSettings.model_validate(table)
    except ValidationError as error:
        raise HemoFedError(_first_fault(error, path), ExitCode.BAD_SITE) from None


def write_site(site_dir: Path | str, settings: SiteSettings) -> None:
    """Write `site.toml`, whole or not at all. Unset values (None) are left out."""
    path = Path(site_dir) / SITE_FILE
    table = settings.model_dump()
    quality = table.pop("quality")  # a table comes last in TOML
    lines = [*_toml_lines(table), "", "[quality]", *_toml_lines(quality)]
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)


def _toml_lines(table: dict[str, object]) -> list[str]:
    """`key = value`; a JSON string, number or boolean is also a TOML one."""
    return [f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None]


def _first_fault(error: ValidationError, path: Path) -> str:
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        fields = QualityPolicy.model_fields if fault["loc"][0] == "quality" else SiteSettings.model_fields
        return f"{path}: unknown key {key!r}; allowed keys: {', '.join(fields)}"
    if fault["type"] == "missing" and key == "disclosure":
        return f'{path}: disclosure is not set; add a line disclosure = "clear", "masked" or "noised"'
    return f"{path}: {key}: {fault['msg']}"
