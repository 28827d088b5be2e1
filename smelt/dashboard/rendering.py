"""Templates of this package to HTML, with everything escaped that a template does not write itself; knows no page."""

from jinja2 import Environment, PackageLoader, StrictUndefined

TEMPLATES = Environment(
    loader=PackageLoader("smelt.dashboard"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: object) -> str:
    """The page that a template makes of these values."""
    return TEMPLATES.get_template(template).render(values)
