"""Render pages from templates, and serve the style sheet and the scripts of pages."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from rlhf.common.text import escape_invisible
from rlhf.reports.page import stylesheet


class Templates:
    """The templates in the folder ``templates`` of a package.

    They can extend ``page.html`` of ``rlhf.web``. Every inserted plain text is escaped for HTML,
    and control characters and characters that change the text direction become visible escapes.

    Args:
        package: Name of the package, such as ``rlhf.labeling``.
    """

    def __init__(self, package: str) -> None:
        self._environment = ImmutableSandboxedEnvironment(
            loader=jinja2.ChoiceLoader(
                [jinja2.PackageLoader(package), jinja2.PackageLoader("rlhf.web")]
            ),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            finalize=_escape_if_plain_text,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def page(self, template: str, /, **values: Any) -> HTMLResponse:
        """Return a response with the rendered template."""
        return HTMLResponse(self._environment.get_template(template).render(values))


def asset_routes(package: str) -> list[BaseRoute]:
    """Return the routes of the files that pages load.

    ``/style.css`` is the common style sheet, and ``/static/NAME`` are the files in the folder
    ``static`` of the package.
    """
    return [
        Route("/style.css", _style_sheet_response),
        Mount("/static", StaticFiles(packages=[(package, "static")])),
    ]


def _style_sheet_response(request: Request) -> Response:
    controls = files("rlhf.web").joinpath("static", "controls.css").read_text(encoding="utf-8")
    return Response(stylesheet() + controls, media_type="text/css")


def _escape_if_plain_text(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, Markup):
        return escape_invisible(value)
    return value
