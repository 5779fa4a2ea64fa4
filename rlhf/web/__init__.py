"""Serve local pages and APIs over HTTP: the server, its access rules, templates and style."""

from __future__ import annotations

from rlhf.common.imports import check_extra_installed

WEB_PACKAGES = ("starlette", "uvicorn", "jinja2")
"""Packages of the extra ``web``."""


def require_web_packages(feature: str) -> None:
    """Check that the extra ``web`` is installed; call this before importing modules of `rlhf.web`.

    Args:
        feature: Name of the command or function that needs the extra, such as ``rlhf chat``.

    Raises:
        UserError: A package of the extra is not installed.
    """
    check_extra_installed(feature, "web", *WEB_PACKAGES)
