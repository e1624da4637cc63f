"""The page at `/`: files of this package alone, read once, with no other host in reach."""

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "web"
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# The page shows what it was given as bytes; it loads from and speaks to its own server alone.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in KINDS}


async def page(request: Request) -> Response:
    """GET / and GET /page/NAME."""
    name = request.path_params.get("name", "index.html")
    if name not in FILES:
        raise HTTPException(404, "the page has no such file")
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    return Response(FILES[name], media_type=KINDS[Path(name).suffix], headers=headers)
