"""`GET /`: the page to try the server with, one HTML file without outside resources; `GET /demo`: its candidates."""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter, Response

from mixencoder.serving.service import Service

_TAGS = re.compile(r"<(script|style)>(.*?)</\1>", flags=re.S)


def router(service: Service) -> APIRouter:
    """Return the routes of the page; it uses the other endpoints."""
    routes = APIRouter(include_in_schema=False)
    package = files("mixencoder")
    page = package.joinpath("serving", "page.html").read_text(encoding="utf-8")
    demo = package.joinpath("cli", "demo.txt").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_policy(page),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @routes.get("/")
    async def show_page() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    @routes.get("/demo")
    async def show_demo() -> Response:
        return Response(demo, media_type="text/plain; charset=utf-8", headers={"X-Content-Type-Options": "nosniff"})

    return routes


def content_policy(page: str) -> str:
    """Return a policy: only the script and style in the page run, nothing else is loaded, and no site frames it."""
    digests: dict[str, list[str]] = {"script": [], "style": []}
    for tag, text in _TAGS.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        digests[tag].append(f"'sha256-{digest}'")
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(digests['script'])}",
            f"style-src {' '.join(digests['style'])}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
