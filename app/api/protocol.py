"""What the server itself answers, before there is a request: also a problem."""

import json
import secrets

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.errors import NotHttp, problem_type


class ProblemProtocol(HttpToolsProtocol):
    """HTTP/1.1 by httptools; what cannot be parsed is answered with a problem."""

    def send_400_response(self, msg: str) -> None:
        request_id = secrets.token_hex(16)
        problem = {
            "type": problem_type(NotHttp),
            "title": NotHttp.title,
            "status": NotHttp.status,
            "detail": "this is not HTTP that can be read",
            "request_id": request_id,
        }
        body = json.dumps(problem).encode()
        head = (
            f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\nx-request-id: {request_id}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
