"""Reading the web: the tool that an agent lists where its model may do so, with the hosts that it may ask."""

import codecs
import re
from dataclasses import replace

from app.domain.egress import read_allowed
from app.domain.errors import ToolError
from app.domain.tool import HttpReply, Tool, ToolContext, tool

_TEXTUAL = re.compile(r"text/[\w.+-]+|application/([\w.+-]+\+)?(json|xml)|application/(x-)?(javascript|ndjson|yaml)")
_CHARSET = re.compile(r";\s*charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE | re.ASCII)
_CODECS = re.compile(
    r"utf-8|utf-16(-[bl]e)?|utf-32(-[bl]e)?|ascii|iso8859-\d+|cp\d+|koi8-\w|mac-\w+|tis-620"
    r"|gbk|gb2312|gb18030|hz|big5\w*|shift_jis\w*|euc_\w+|iso2022_\w+|johab"
)
"""Python knows more than character sets by the names that a server may write: `unicode_escape`, `idna`, `punycode`."""
_SPARE_SECONDS = 2.0
"""What the tool has beyond the time of the request, to say that it was not enough."""


def http_get(
    *allow: str, name: str = "http_get", timeout_s: float = 20.0, max_bytes: int = 1_000_000, max_chars: int = 20_000
) -> Tool:
    """A tool that reads pages of these hosts: `api.example.com`, `*.example.org`, `wiki.internal:8080`.

    `timeout_s`: seconds for the whole answer. `max_bytes`: of the answer; a larger one is refused. `max_chars`: of
    the text that the model is shown; a longer one is cut.
    Raises `ValueError` for no host, or for what is not one.
    """
    if not allow:
        raise ValueError("http_get: say which hosts may be asked, as in http_get('api.example.com')")
    for host in allow:
        read_allowed(host)

    async def get(ctx: ToolContext, url: str) -> str:
        reply = await ctx.http.get(
            url, allow=allow, headers={"Accept": "text/*, */*;q=0.5"}, max_bytes=max_bytes, timeout_s=timeout_s
        )
        return f"HTTP {reply.status} {reply.url}\n\n{_text_of(reply)}"

    get.__doc__ = f"""Read a page or a document by its address, with HTTP GET.

Only text, and only from these hosts: {", ".join(allow)}

Args:
    url: The address; it begins with https://.
"""
    made = tool(name=name, timeout_s=timeout_s + _SPARE_SECONDS)(get)
    return replace(made, max_result_chars=max_chars)


def _text_of(reply: HttpReply) -> str:
    """Raises `ToolError` unless it is declared to be text. What does not fit its character set becomes U+FFFD."""
    kind = reply.content_type.partition(";")[0].strip().lower()
    if not _TEXTUAL.fullmatch(kind):
        raise ToolError(f"HTTP {reply.status}: the answer is {kind or 'of no declared type'}, not text.")
    charset = _CHARSET.search(reply.content_type)
    return reply.body.decode(_codec(charset[1] if charset else "utf-8"), errors="replace").removeprefix("\ufeff")


def _codec(charset: str) -> str:
    try:
        name = codecs.lookup(charset).name
    except (LookupError, ValueError):
        return "utf-8"
    return name if _CODECS.fullmatch(name) else "utf-8"
